# SPDX-License-Identifier: Apache-2.0
"""Intruder dimensions: which there are, what is left of them, and what PEFT makes of them."""

import peft
import pytest
import torch
from peft.tuners.lora import intruders as theirs_of
from torch.testing import assert_close

import graft
from tests import models
from tests.combine.test_convert import moved
from tests.pair import LIBS, close
from tests.raised import refuses

REDUCE = {graft: graft.reduce_intruder_dimension, peft: theirs_of.reduce_intruder_dimension}
T = ["lin0", "fc1", "fc2"]


def made(lib, base="mlp", **values):
    values = dict(r=3, lora_alpha=5, target_modules=T) | values
    with models.seeded(1):
        model = lib.get_peft_model(models.make(base), lib.LoraConfig(**values))
    return moved(model, 1.0)


def reduced(model, lib=graft, **options):
    lines = []
    REDUCE[lib](model, **{"threshold_epsilon": 0.9, "mitigation_lambda": 0.5, **options}, logging_sink=lines.append)
    return lines


def deltas(model, name):
    return {
        key: layer.get_delta_weight(name).detach()
        for key, layer in model.base_model.model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


@pytest.mark.differs("`reduce_intruder_dimension` on Conv1D")
@pytest.mark.parametrize(
    "options", [{}, dict(threshold_epsilon=0.5), dict(mitigation_lambda=0.0), dict(top_k=2)], ids=str
)
@pytest.mark.parametrize(
    "values", [dict(), dict(rank_pattern={"fc1": 5}, use_rslora=True), dict(modules_to_save=["head"])], ids=str
)
def test_the_new_adapter_is_pefts(values, options):
    ours, theirs = (made(lib, **values) for lib in LIBS)
    said = [reduced(model, lib, **options) for model, lib in zip((ours, theirs), LIBS)]
    assert said[0] == said[1]
    assert ours.active_adapters == theirs.active_adapters == ["intruder_reduced"]
    a, b = deltas(ours, "intruder_reduced"), deltas(theirs, "intruder_reduced")
    assert a.keys() == b.keys()
    for key in b:
        close(a[key], b[key], 1e-4, key)


KINDS = [("mlp", "layers.0.fc1"), ("conv1D", "c_fc"), ("embedding", "emb"), ("conv2d", "conv")]


@pytest.mark.parametrize("base, key", KINDS)
def test_what_there_is_and_what_is_left(base, key):
    """By the definition: of W + ΔW, singular vectors that are near none of W's are scaled down, others are not.

    PEFT's new adapter for Conv1D is transposed, so that its forward pass fails.
    """
    model, part = made(graft, base, target_modules=[key]), 0.25
    layer = model.base_model.model.get_submodule(key)
    W, D = (layer.op.canon(t).detach().flatten(1).clone() for t in (layer.weight, layer.get_delta_weight("default")))
    reduced(model, mitigation_lambda=part, threshold_epsilon=0.6, top_k=4)
    U, S, Vh = torch.linalg.svd(W + D, full_matrices=False)
    near = (U.T @ torch.linalg.svd(W, full_matrices=False).U).abs().amax(1)
    assert (near[:4] < 0.6).any()
    D = D + sum((part - 1) * S[i] * torch.outer(U[:, i], Vh[i]) for i in range(4) if near[i] < 0.6)
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    new = layer.op.canon(layer.get_delta_weight("intruder_reduced")).flatten(1)
    assert_close(new, (U[:, :3] * S[:3]) @ Vh[:3], rtol=1e-4, atol=1e-4)
    assert model(**models.inputs(base)).isfinite().all()


def test_without_intruders_it_is_a_copy():
    for lib in LIBS:
        model = made(lib, lora_dropout=0.0)
        lines = reduced(model, lib, threshold_epsilon=0.0)
        assert all("No intruders" in line for line in lines[:-1]) and len(lines) == 8
    old, new = deltas(model, "default"), deltas(model, "intruder_reduced")
    model = made(graft, lora_bias=True, target_modules=["lin0", "fc1"], modules_to_save=["head"])
    expected = model(**models.inputs("mlp"))
    reduced(model, threshold_epsilon=0.0)
    assert torch.equal(model(**models.inputs("mlp")), expected)
    assert all(torch.equal(old[key], new[key]) for key in old)


def test_a_merged_adapter_and_a_file(tmp_path):
    model = made(graft)
    reduced(model, new_adapter_name="a")
    expected = deltas(model, "a")
    model.set_adapter("default")
    model.merge_adapter()
    reduced(model, new_adapter_name="b")
    for key, D in deltas(model, "b").items():
        assert_close(D, expected[key], rtol=1e-3, atol=1e-4)
    assert not model.base_model.model.lin0.merged_adapters
    model.save_pretrained(tmp_path, selected_adapters=["b"])
    loaded = graft.PeftModel.from_pretrained(models.make("mlp"), tmp_path / "b")
    assert_close(loaded(**models.inputs("mlp")), model(**models.inputs("mlp")), rtol=1e-5, atol=1e-5)


def state(model):
    return list(model.peft_config), model.active_adapters, {k: t.clone() for k, t in model.state_dict().items()}


REFUSED = {
    "no LoRA": (lambda lib: loha(lib), {}, "The provided model is not using LoRA"),
    "a name that is taken": (made, dict(new_adapter_name="default"), "'default' already exists"),
    "biases": (lambda lib: made(lib, bias="all"), {}, "supports only 1 adapter with bias"),
}


def loha(lib):
    return lib.get_peft_model(models.make("mlp"), lib.LoHaConfig(r=2, target_modules=T))


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_pefts(case):
    make, options, text = REFUSED[case]
    for lib in LIBS:
        refuses(ValueError, text, reduced, make(lib), lib, **options)


@pytest.mark.differs("`reduce_intruder_dimension` of DoRA, BD-LoRA, QA-LoRA")
@pytest.mark.differs("`reduce_intruder_dimension` of an adapter that is not there")
@pytest.mark.parametrize(
    "make, old, error, text",
    [
        (lambda: made(graft, use_dora=True), "default", graft.ConfigError, "it is no plain product"),
        (
            lambda: made(graft, "conv2d", r=4, target_modules=["grouped"]),
            "default",
            graft.ConfigError,
            "no plain product",
        ),
        (lambda: made(graft), "zz", graft.AdapterNotFoundError, "zz"),
    ],
)
def test_refusals_change_nothing(make, old, error, text):
    model = make()
    before = state(model)
    refuses(error, text, reduced, model, old_adapter_name=old)
    after = state(model)
    assert after[:2] == before[:2] and all(torch.equal(after[2][k], t) for k, t in before[2].items())
    refuses(graft.ConfigError, "not using LoRA", graft.reduce_intruder_dimension, models.make("mlp"))


def test_stacks_of_matrices_are_refused():
    class Experts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.Parameter(torch.randn(3, 6, 10))

    base = torch.nn.ModuleDict({"experts": Experts()})
    model = graft.get_peft_model(base, graft.LoraConfig(r=2, target_parameters=["experts.up"]))
    refuses(graft.ConfigError, "no plain product", graft.reduce_intruder_dimension, model)


def test_the_new_adapter_has_the_dtype_of_the_old():
    with models.seeded(1):
        base = models.make("mlp").to(torch.bfloat16)
        model = graft.get_peft_model(base, graft.LoraConfig(r=3, target_modules=T), autocast_adapter_dtype=False)
    reduced(moved(model, 1.0), threshold_epsilon=999)
    assert {p.dtype for n, p in model.named_parameters() if "intruder_reduced" in n} == {torch.bfloat16}
