# SPDX-License-Identifier: Apache-2.0
"""FRoD: categories, adapters beside each other, and the weight that it stands for."""

import pytest
import torch

import graft
from graft.methods.frod import category
from tests import models
from tests.pair import LIBS, adapt, close, output, randomize
from tests.samples import Sample, first

SAMPLE = first("FROD")


@pytest.mark.parametrize(
    "path, name",
    [
        ("lin0", "lin0"),
        ("layers.0", "layers_0"),
        ("layers.0.fc1", "fc1"),
        ("model.layers.3.self_attn.q_proj", "self_attn_q_proj"),
        ("encoder.layer.1.attention.output.dense", "attention_output"),
        ("encoder.layer.1.output.dense", "output_dense"),
    ],
)
def test_categories(path, name):
    assert category(path) == name


@pytest.mark.differs("FRoD on layers of one category with different numbers of inputs")
def test_layers_of_one_category_need_one_width():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"q": torch.nn.Linear(n, 4)}) for n in (4, 6)])

    with pytest.raises(graft.ConfigError, match=r"category 'q', and they have \[4, 6\] inputs"):
        graft.get_peft_model(Net(), graft.FrodConfig(target_modules=["q"]))


def test_a_second_adapter_shares_v_and_may_have_more_layers():
    model = adapt(graft, SAMPLE)
    model.add_adapter("b", SAMPLE.config(graft, target_modules=["lin0", "fc1", "fc2", "head"]))
    held = model.base_model.frod_V
    assert held.lin0["b"] is held.lin0["default"] and "default" not in held.head
    randomize(model, SAMPLE).eval()
    model.base_model.set_adapter(["default", "b"])
    both = output(model, SAMPLE)
    model.merge_adapter()
    close(output(model, SAMPLE), both, 1e-4)


@pytest.mark.differs("FRoD adapters of different `sparse_rate` on one model")
def test_adapters_may_have_other_entries():
    """PEFT gives the second adapter the entries of the first."""
    model = adapt(graft, SAMPLE)
    model.add_adapter("b", SAMPLE.config(graft, sparse_rate=0.3))
    randomize(model, SAMPLE).eval().set_adapter("b")
    expected = output(model, SAMPLE)
    model.merge_adapter()
    close(output(model, SAMPLE), expected, 1e-4)


def test_without_entries_beside_the_diagonal(tmp_path):
    sample = Sample("FROD", "x", "mlp", dict(SAMPLE.kwargs, sparse_rate=0.0))
    model = randomize(adapt(graft, sample), sample).eval()
    model.save_pretrained(tmp_path)
    for lib in LIBS:
        close(output(lib.PeftModel.from_pretrained(models.make("mlp"), tmp_path), sample), output(model, sample))


def test_an_adapter_made_while_another_is_merged_is_the_same():
    low = first("LORA")
    mixed = graft.get_peft_model(models.make("mlp"), low.config(graft), "low", mixed=True)
    randomize(mixed, low).merge_adapter()
    mixed.add_adapter("frod", SAMPLE.config(graft))
    assert mixed.base_model.model.lin0.merged_adapters == ["low"]
    layer = mixed.base_model.model.lin0
    close(
        layer.get_delta_weight("frod"), torch.zeros_like(layer.base_layer.weight), 1e-4
    )  # of W₀, not of what is there
    assert (layer.base_layer.weight - layer.W0).abs().max() > 0.1
