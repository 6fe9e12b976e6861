# SPDX-License-Identifier: Apache-2.0
"""GLoRA: its formula, its kinds of tensors, and how its adapters add up."""

import peft
import pytest
import torch
from torch import nn

import graft
from graft.kernels.low_rank import FUSED_FROM
from tests import models
from tests.models import adapted
from tests.pair import LIBS, close, output, randomize
from tests.raised import refuses
from tests.samples import Sample, first

KINDS = {
    "lora": {},
    "vector": dict(config_A_B="vector", config_C="vector", config_D_E="vector"),
    "constant": dict(config_A_B="constant"),
    "none": dict(config_A_B="none", config_C="none", config_D_E="none"),
}
X = torch.linspace(-1, 1, 24).view(3, 8)


def net() -> nn.Sequential:
    with models.seeded(0):
        return nn.Sequential(nn.Linear(8, 6))


def with_kind(kind: str, *names: str):
    config = graft.GloraConfig(target_modules=["0"], r=2, **KINDS[kind])
    return randomize(adapted(net(), dict.fromkeys(names, config), scale=0), Sample("GLORA", "", "mlp", {}))


def whole(support, shape):
    """A tensor of GLoRA in full."""
    if support.kind == "none":
        return support.zeros
    return support.Xd @ support.Xu if support.kind == "lora" else support.X.expand(shape)


@pytest.mark.parametrize("kind", KINDS)
def test_its_formula(kind):
    model = with_kind(kind, "default")
    layer, base = model.base_model.model[0], net()[0]
    shapes = dict(A=(6, 8), B=(6, 8), C=(8, 1), D=(6,), E=(6,))
    A, B, C, D, E = (whole(getattr(layer, f"glora_{n}")["default"], shape) for n, shape in shapes.items())
    W = base.weight * (1 + A) + B
    b = base.bias * (1 + D) + E + (base.weight @ C)[:, 0]
    close(model(X), X @ W.T + b)


@pytest.mark.parametrize("kind", ["vector", "constant"])
def test_a_sum_of_features_may_be_more_than_half_precision_holds(kind):
    """B is added to each weight: so it multiplies the sum of x, here 80,000."""
    base = nn.Sequential(nn.Linear(400, 6)).half()
    model = graft.get_peft_model(base, graft.GloraConfig(target_modules=["0"], **KINDS[kind]))
    layer = model.base_model.model[0]
    layer.base_layer.weight.data.zero_()
    layer.glora_B["default"].X.data.fill_(1e-3)
    y = model(torch.full((FUSED_FROM, 400), 200.0, dtype=torch.float16))
    close(y - layer.base_layer.bias, torch.full_like(y, 80), 1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_act_on_the_weight_as_it_was(kind):
    """In any order, merged or not: W + W ⊙ (A₁ + A₂) + B₁ + B₂, and the same of the bias."""
    model, base = with_kind(kind, "default", "b"), net()
    alone = []
    for name in ("default", "b"):
        model.set_adapter(name)
        alone.append(model(X))
    model.base_model.set_adapter(["default", "b"])
    close(model(X), sum(alone) - base(X))
    for steps in (["default", "b"], ["b", "default"]):
        for name in steps:
            model.merge_adapter([name])
        close(model(X), sum(alone) - base(X))
        model.unmerge_adapter()
        close(model.base_model.model[0].base_layer.weight, base[0].weight, 0)
        close(model.base_model.model[0].base_layer.bias, base[0].bias, 0)


@pytest.mark.differs("GLoRA unmerge")
def test_unmerging_where_a_weight_became_zero():
    """PEFT divides by 1 + A, which is 0 here."""
    kept = []
    for lib in LIBS:
        model = lib.get_peft_model(net(), lib.GloraConfig(target_modules=["0"], config_A_B="constant"))
        model.base_model.model[0].glora_A["default"].X.data.fill_(-1)
        model.merge_adapter()
        model.unmerge_adapter()
        kept.append(model.base_model.model[0].base_layer.weight.detach())
    close(kept[0], net()[0].weight, 0)
    assert not kept[1].isfinite().all()


@pytest.mark.differs("GLoRA: mixed batches in training")
def test_a_mixed_batch_trains():
    """PEFT refuses it in training."""
    model = with_kind("lora", "default", "b").train()
    model.set_requires_grad(["default", "b"])
    model(X, adapter_names=["default", "b", "__base__"]).square().sum().backward()
    layer = model.base_model.model[0]
    assert all(p.grad is not None for name in ("default", "b") for p in layer.parameters_of(name))
    with pytest.raises(ValueError):
        theirs = peft.get_peft_model(net(), peft.GloraConfig(target_modules=["0"])).train()
        theirs(X, adapter_names=["default"] * 3)


def test_a_base_bias_that_trains_gets_its_whole_gradient():
    """b' = b + b ⊙ D + …"""
    found = []
    for lib in LIBS:
        sample = first("GLORA", "mlp", "bias_all")
        model = randomize(lib.get_peft_model(models.make("mlp"), sample.config(lib)), sample)
        output(model, sample).square().sum().backward()
        found.append(model.base_model.model.lin0.base_layer.bias.grad)
    close(*found)


@pytest.mark.parametrize("field", ["config_A_B", "config_C", "config_D_E"])
def test_unknown_kinds(field):
    for lib in LIBS:
        refuses(ValueError, field, lib.GloraConfig, **{field: "matrix"})
    refuses(graft.ConfigError, "`r` should be a positive integer", graft.GloraConfig, r=0)


@pytest.mark.differs("GLoRA on a base in half precision")
def test_updates_below_the_base_s_precision_act():
    """On a bfloat16 base, PEFT rounds W' to bfloat16, and most of what is smaller than its steps is lost."""
    x, found = torch.ones(1, 1024).bfloat16(), []
    for lib in LIBS:
        with models.seeded(1):
            base = nn.Sequential(nn.Linear(1024, 48, bias=False)).bfloat16()
            model = lib.get_peft_model(base, lib.GloraConfig(target_modules=["0"], config_A_B="constant"))
        layer = model.base_model.model[0]
        layer.glora_B["default"].X.data.fill_(2e-5)
        exact = x.double() @ (layer.base_layer.weight.double() + 2e-5).T
        found.append((model(x).double() - exact).norm().item())
    assert found[0] < 0.5 * found[1], found
