# SPDX-License-Identifier: Apache-2.0
"""DoraCaching: norms are computed once, and again whenever what they depend on is another."""

import copy

import peft
import pytest
import torch
from peft.helpers import DoraCaching as Theirs

import graft
from graft import DoraCaching
from graft.methods.lora import dora
from tests import models
from tests.combine.test_convert import made, moved
from tests.leaves_out import WHOLE_GRAPHS

VALUES = dict(r=2, lora_alpha=5, use_dora=True)
X = models.inputs("mlp")


@pytest.fixture(autouse=True)
def off():
    yield
    DoraCaching()(enabled=False)
    Theirs()(enabled=False)


@pytest.fixture
def norms(monkeypatch):
    """How many norms have been computed: one for each of seven layers in a call without caching."""
    seen, compute = [], dora.row_norms
    monkeypatch.setattr(dora, "row_norms", lambda *args: seen.append(1) or compute(*args))

    def count():
        n = len(seen)
        seen.clear()
        return n

    return count


def with_dora(base="mlp", **values):
    return made(graft, ("LoraConfig", VALUES | values), base)


def test_norms_are_kept_in_the_block(norms):
    model = with_dora()
    expected, _ = model(**X), norms()
    with DoraCaching():
        outputs = [model(**X) for _ in range(3)]
        assert norms() == 7
    assert all(torch.equal(y, expected) for y in outputs)
    model(**X)
    assert norms() == 7


def test_as_a_switch(norms):
    model = with_dora()
    caching = DoraCaching()
    norms(), model(**X), model(**X)
    assert norms() == 14, "made, and not switched on"
    caching(enabled=True)
    model(**X), model(**X)
    assert norms() == 7
    with DoraCaching(enabled=False):
        model(**X)
        assert norms() == 7
    model(**X)
    caching(enabled=False)
    norms(), model(**X)
    assert norms() == 7


def fresh(model):
    DoraCaching()(enabled=False)
    y = model(**X)
    DoraCaching()(enabled=True)
    return y


def optimizer_step(model):
    model.train()
    model(**X).square().mean().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5).step()
    model.eval()


def other_values(model):
    tensors = {k: t + 1 for k, t in graft.get_peft_model_state_dict(model).items()}
    graft.set_peft_model_state_dict(model, tensors)


def base_weight(model):
    with torch.no_grad():
        model.base_model.model.lin0.base_layer.weight.mul_(3)


def scaling(model):
    for layer in model.modules():
        if isinstance(layer, graft.AdapterLayer):
            layer.set_scale("default", 3.0)


def merged_and_back(model):
    model.merge_adapter()
    model(**X)
    model.unmerge_adapter()


def in_double(model):
    model.double().float()


CHANGES = [optimizer_step, other_values, base_weight, scaling, merged_and_back, in_double]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_what_changes_is_seen(change):
    model = with_dora()
    DoraCaching()(enabled=True)
    before = model(**X)
    change(model)
    y = model(**X)
    assert torch.allclose(y, fresh(model), atol=1e-6)
    if change not in (merged_and_back, in_double):
        assert not torch.allclose(y, before, atol=1e-3)


def test_switching_forgets_norms():
    """Which code that writes to `data` needs."""
    model = with_dora()
    with DoraCaching():
        model(**X)
    model.base_model.model.lin0.lora_A["default"].weight.data.mul_(3)
    expected = model(**X)
    with DoraCaching():
        assert torch.equal(model(**X), expected)


@pytest.mark.differs("`DoraCaching` while values change")
def test_pefts_norms_go_stale():
    for lib, caching in ((graft, DoraCaching), (peft, Theirs)):
        model = made(lib, ("LoraConfig", VALUES))
        with caching():
            model(**X)
            with torch.no_grad():
                model.base_model.model.lin0.lora_A["default"].weight.mul_(3)
            kept = model(**X)
        assert torch.allclose(kept, model(**X), atol=1e-5) == (lib is graft)


def test_training_computes_norms_in_every_call(norms):
    model, _ = with_dora().train(), norms()
    with DoraCaching():
        model(**X), model(**X)
        assert norms() == 14
        model.eval()
        model(**X), model(**X)
        assert norms() == 7


@pytest.mark.parametrize("base", ["conv1D", "embedding", "conv2d"])
def test_on_other_layers(base):
    targets = {"conv1D": ["c_fc"], "embedding": ["emb"], "conv2d": ["conv", "point"]}[base]
    model, x = with_dora(base, target_modules=targets), models.inputs(base)
    with DoraCaching():
        assert torch.equal(model(**x), model(**x))


def test_two_adapters_and_a_mixed_batch():
    model = with_dora()
    model.add_adapter("other", graft.LoraConfig(r=3, use_dora=True, target_modules=["lin0", "fc1"]))
    model.base_model.set_adapter("other")
    moved(model)
    names = ["default", "other", "__base__"]
    expected = model(**X, adapter_names=names)
    with DoraCaching():
        for _ in range(2):
            assert torch.allclose(model(**X, adapter_names=names), expected, atol=1e-6)


def test_norms_of_inference_mode_serve_calls_with_gradients():
    model = with_dora()
    with DoraCaching():
        with torch.inference_mode():
            model(**X)
        model(**X).square().mean().backward()
    assert model.base_model.model.lin0.lora_magnitude_vector["default"].weight.grad.any()


def test_gradients_of_the_magnitudes_stay():
    model = with_dora()
    with DoraCaching():
        for _ in range(2):
            model.zero_grad()
            model(**X).square().mean().backward()
    m = model.base_model.model.lin0.lora_magnitude_vector["default"].weight
    cached = m.grad.clone()
    model.zero_grad()
    model(**X).square().mean().backward()
    assert torch.allclose(m.grad, cached, atol=1e-6)


@WHOLE_GRAPHS
def test_copies_and_compiled_models():
    model = with_dora()
    with DoraCaching(), torch.no_grad():
        expected = model(**X)
        assert torch.allclose(copy.deepcopy(model)(**X), expected, atol=1e-6)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.allclose(compiled(**X), expected, atol=1e-5)
    with torch.inference_mode(), DoraCaching():
        assert torch.allclose(model(**X), expected, atol=1e-6)


def test_outputs_are_pefts():
    model = made(peft, ("LoraConfig", VALUES))
    with Theirs():
        model(**X)
        theirs = model(**X)
    ours = with_dora()
    with DoraCaching():
        ours(**X)
        assert torch.allclose(ours(**X), theirs, atol=1e-5)
