# SPDX-License-Identifier: Apache-2.0
"""PEANuT: its network on the weight, its activations, its names in files."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import graft
from tests.models import adapted, seeded
from tests.pair import LIBS, close

X = torch.linspace(-1, 1, 24).view(3, 8)


def net(dtype=torch.float32) -> nn.Sequential:
    with seeded(0):
        return nn.Sequential(nn.Linear(8, 6)).to(dtype)


@torch.no_grad()
def disturbed(model):
    with seeded(3):
        for name, p in model.named_parameters():
            if "peanut_" in name:
                p.add_(torch.randn(p.shape), alpha=0.3)
    return model.eval()


def with_peanut(lib=graft, dtype=torch.float32, **options):
    config = lib.PeanutConfig(**{"target_modules": ["0"], "r": 3, "act_fn": "tanh", "scaling": 1.37} | options)
    return disturbed(adapted(net(dtype), config, lib=lib, scale=0))


def test_its_formula():
    model = with_peanut(depth=2)
    layer, W = model.base_model.model[0], net()[0].weight
    E, D = ([m.weight for m in getattr(layer, f"peanut_{which}coders")["default"]] for which in ("en", "de"))
    z0 = torch.tanh(W.T @ layer.peanut_A["default"].weight.T)  # (in, r)
    z1 = torch.tanh(z0 @ E[0].T)
    z2 = torch.tanh(z1 @ E[1].T)
    z = torch.tanh(z2 @ D[0].T) + z1
    z = torch.tanh(z @ D[1].T) + z0
    close(model(X), net()(X) + X @ z @ layer.peanut_B["default"].weight.T * 1.37)


@pytest.mark.parametrize("name", ["relu", "gelu", "silu", "tanh", "sigmoid", "mish", "leaky_relu", "gelu_new", "relu2"])
def test_activations_are_those_of_transformers(name):
    ours, theirs = (with_peanut(lib, depth=1, act_fn=name) for lib in LIBS)
    theirs.load_state_dict(ours.state_dict())
    close(ours(X), theirs(X))


def test_names_in_files(tmp_path):
    model = with_peanut(depth=2)
    model.add_adapter("b", model.peft_config["default"])
    model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "b"):
        names = {
            name.removeprefix("base_model.model.0.peanut_") for name in load_file(folder / "adapter_model.safetensors")
        }
        lists = {f"{which}coders.{i}.weight" for which in ("en", "de") for i in (0, 1)}
        assert names == {"A.weight", "B.weight"} | lists


def test_a_base_in_half_precision_is_widened_in_parts(monkeypatch):
    """The network sees the weight as it is, and no copy of it stays for the backward pass."""
    from graft.kernels import narrow

    model = with_peanut(dtype=torch.bfloat16, depth=1).train()
    exact = copy.deepcopy(model).double()
    monkeypatch.setattr(narrow, "PART", 6)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(X.bfloat16())
    assert not any(t.shape in ((6, 8), (8, 6)) and t.dtype == torch.float32 for t in kept)
    y.float().sum().backward()
    exact(X.bfloat16().double()).sum().backward()
    mine = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for n, p in exact.named_parameters():
        if p.grad is not None:
            assert (mine[n].double() - p.grad).norm() < 2e-2 * p.grad.norm(), n


@pytest.mark.differs("PEANuT's `get_delta_weight` while merged")
def test_its_update_is_of_the_weight_as_it_was():
    """PEFT computes it of the merged weight."""
    for lib in LIBS:
        model = with_peanut(lib)
        layer = model.base_model.model[0]
        before = layer.get_delta_weight("default")
        model.merge_adapter()
        same = torch.allclose(layer.get_delta_weight("default"), before, atol=1e-5)
        assert same == (lib is graft)


def test_bad_configs():
    for lib in LIBS:
        for options in (dict(r=0), dict(depth=-1), dict(act_fn="none of these")):
            with pytest.raises(ValueError):
                lib.PeanutConfig(**options)
