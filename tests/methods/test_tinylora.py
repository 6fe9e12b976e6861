# SPDX-License-Identifier: Apache-2.0
"""TinyLoRA: groups of layers, and adapters whose base is another."""

import pytest
import torch

import graft
from tests import models
from tests.pair import LIBS, adapt, close, output, randomize
from tests.samples import Sample, first

SAMPLE = first("TINYLORA")


@pytest.mark.differs("TinyLoRA with `init_weights=False`")
def test_a_start_that_is_random_is_no_garbage():
    """With init_weights=False PEFT leaves memory as it is."""
    model = adapt(graft, Sample("TINYLORA", "x", "mlp", dict(SAMPLE.kwargs, init_weights=False, init_v_bound=0.5)))
    for v in model.base_model.tinylora_v["default"].parameters():
        assert v.abs().max() <= 0.5 and v.std() > 0.1


@pytest.mark.parametrize("tying, groups", [(0.0, 5), (0.3, 4), (0.5, 2), (0.9, 1), (1.0, 1)])
def test_groups_of_layers(tying, groups):
    config = graft.TinyLoraConfig(target_modules=["lin0", "fc1", "fc2"], u=3, weight_tying=tying)
    model = graft.get_peft_model(models.make("mlp"), config)
    layers = len([m for m in model.modules() if isinstance(m, graft.AdapterLayer)])
    expected = max(1, round(layers * (1 - tying)))
    assert len(list(model.base_model.tinylora_v["default"].parameters())) == expected
    if layers == 5:
        assert expected == groups


def test_a_layer_tells_the_rank_that_it_has():
    """That of its smaller side, if `r` is more."""
    ours, theirs = (
        {
            m.in_features: m.r
            for m in adapt(lib, Sample("TINYLORA", "x", "mlp", dict(SAMPLE.kwargs, r=12))).modules()
            if hasattr(m, "tinylora_P")
        }
        for lib in LIBS
    )
    assert ours == theirs and min(r["default"] for r in ours.values()) < 12


def test_values_of_a_merged_base_do_not_enter_the_start():
    sample = first("LORA")
    model = randomize(adapt(graft, sample), sample)
    mixed = graft.get_peft_model(models.make("mlp"), sample.config(graft), "low", mixed=True)
    randomize(mixed, sample).merge_adapter()
    mixed.add_adapter("tiny", SAMPLE.config(graft))
    plain = adapt(graft, SAMPLE)
    for name, layer in plain.base_model.model.named_modules():
        if isinstance(layer, graft.AdapterLayer):
            other = mixed.base_model.model.get_submodule(name)
            close(other.tinylora_A["tiny"].abs(), layer.tinylora_A["default"].abs(), 1e-4)
    assert model is not None


def test_a_file_needs_no_singular_values(tmp_path, monkeypatch):
    model = randomize(adapt(graft, SAMPLE), SAMPLE).eval()
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(torch.linalg, "svd", None)
    loaded = graft.PeftModel.from_pretrained(models.make("mlp"), tmp_path)
    close(output(loaded, SAMPLE), output(model, SAMPLE), 0)
