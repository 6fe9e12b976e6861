# SPDX-License-Identifier: Apache-2.0
"""Factors of high rank, in one product with the weight; and factors of which A does not train."""

import pytest
import torch
from torch import nn

import graft
from graft.kernels import one_product
from graft.kernels.low_rank import FUSED_FROM
from tests.kernels import references
from tests.models import seeded
from tests.pair import close

ROWS, IN, OUT = FUSED_FROM + 6, 20, 12


def tensors(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    shapes = {"W": (OUT, IN), "bias": (OUT,), "x": (2, ROWS // 2, IN), "A": (9, IN), "B": (OUT, 9)}
    return {name: torch.randn(shape, generator=g, dtype=dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("trains", [["x", "A", "B"], ["A", "B"], ["x", "B"], ["x", "A"], ["x", "A", "B", "bias"]])
def test_one_product_is_the_reference(trains):
    t = tensors()
    for name in trains:
        t[name].requires_grad_()
    found = []

    def one(W, bias, x, *factors):
        delta = one_product.Factored(*factors)
        return one_product.linear_with(W, bias, x, delta, nn.functional.linear, lambda g, W: g @ W)

    def two(W, bias, x, A, B, scale):
        return references.plain_linear_with(W, bias, x, scale * B @ A)

    for form in (two, one):
        y = form(t["W"], t["bias"], t["x"], t["A"], t["B"], 1.37)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        found.append((y, *torch.autograd.grad((y * weights).sum(), [t[name] for name in trains])))
    for ours, theirs in zip(*found):
        close(ours, theirs, 1e-9)


@pytest.mark.parametrize("rows, r, pays", [(1024, 16, False), (1024, 64, False), (4096, 512, True), (64, 512, False)])
def test_it_pays_for_many_rows_and_high_rank(rows, r, pays):
    assert one_product.low_rank_pays(rows, 576, 576, r, True, True) is pays


def model(freeze=(), **config):
    with seeded(0):
        base = nn.Sequential(nn.Linear(IN, OUT))
        made = graft.get_peft_model(base, graft.LoraConfig(target_modules=["0"], lora_alpha=4, **config))
        for name, p in made.named_parameters():
            if "lora" in name:
                nn.init.normal_(p)
                p.requires_grad = not any(part in name for part in freeze)
    return made


@pytest.mark.parametrize("freeze", [(), ("lora_A",), ("lora_B",), ("lora_A", "lora_B")])
@pytest.mark.parametrize("config", [dict(r=2), dict(r=12), dict(r=12, lora_dropout=0.4)])
def test_layers_agree_with_plain_operations(freeze, config, monkeypatch):
    """Those that run if a hook wants to see every module."""
    calls = []
    real = one_product.linear_with
    monkeypatch.setattr(one_product, "linear_with", lambda *a: calls.append(1) or real(*a))
    x = torch.randn(ROWS, IN, generator=torch.Generator().manual_seed(1))
    found = []
    for hooked in (False, True):
        made = model(freeze, **config).train("lora_dropout" not in config)
        layer = made.base_model.model[0]
        if hooked:
            layer.base_layer.register_forward_hook(lambda *_: None)
        own = x.clone().requires_grad_()
        y = made(own)
        (y * torch.linspace(-1, 1, OUT)).sum().backward()
        found.append({n: p.grad for n, p in made.named_parameters()} | {"x": own.grad, "y": y})
    assert bool(calls) == (config["r"] == 12 and freeze != ("lora_A",))
    for name, theirs in found[1].items():
        assert (found[0][name] is None) == (theirs is None)
        if theirs is not None:
            close(found[0][name], theirs, 2e-5, name)


def test_an_a_that_does_not_train_keeps_no_input():
    """As in LoRA-FA and TinyLoRA."""
    kept = []
    made, x = model(("lora_A",), r=2), torch.randn(ROWS, IN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        made(x)
    assert x.shape not in kept and (ROWS, 2) in kept
