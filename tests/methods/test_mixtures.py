# SPDX-License-Identifier: Apache-2.0
"""Mixtures of low-rank experts by their formulas, expert by expert and token by token."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graft
from tests.looks import layers
from tests.models import seeded


def linear(config, names=("default",)):
    """A model of one layer with adapters whose every value is random."""
    with seeded(0):
        model = graft.get_peft_model(nn.Sequential(nn.Linear(4, 5)), config, names[0])
        for name in names[1:]:
            model.add_adapter(name, config)
        for p in layers(model)["0"].parameters():
            p.data.normal_()
    return model.eval()


def inputs(*shape):
    with seeded(1):
        return torch.randn(*shape, 4)


# EWoRA


def ewora(**options):
    return graft.EworaConfig(target_modules=["0"], **{"r": 3, "num_experts": 2, **options})


def test_ewora_weighs_experts_by_all_their_ranks():
    model, x = linear(ewora()), inputs(2, 3)
    layer = layers(model)["0"]
    A, B, W = (getattr(layer, f"ewora_{name}")["default"] for name in ("As", "Bs", "weighting"))
    assert (A.shape, B.shape, W.weight.shape) == ((2, 4, 3), (2, 3, 5), (2, 6))
    y = model(x)
    for row, token in ((0, 0), (1, 2)):
        own = x[row, token]
        g = W.weight @ torch.cat([own @ A[0], own @ A[1]]).clamp_min(0) + W.bias
        expected = layer.base_layer(own) + g[0] * (own @ A[0] @ B[0]) + g[1] * (own @ A[1] @ B[1])
        assert_close(y[row, token], expected)


def test_how_ewora_begins():
    with seeded(0):
        model = graft.get_peft_model(nn.Sequential(nn.Linear(400, 5)), ewora(r=4, num_experts=8))
    layer = layers(model)["0"]
    A, B, W = (getattr(layer, f"ewora_{name}")["default"] for name in ("As", "Bs", "weighting"))
    bounds = {0.025: A, 0.01: W.weight}  # 1 / √(400 · 4), whatever kaiming's rule for two dimensions
    for bound, t in bounds.items():
        assert 0.9 * bound < t.abs().max() <= bound
    assert not B.any() and 0 < W.bias.abs().max() <= 32**-0.5


def test_eworas_experts_lose_inputs_of_their_own():
    model, x = linear(ewora(ewora_dropout=0.5)).train(), inputs(1)
    layer = layers(model)["0"]
    A, B, W = (getattr(layer, f"ewora_{name}")["default"] for name in ("As", "Bs", "weighting"))
    W.weight.data.zero_()
    W.bias.data.copy_(torch.tensor([1.0, -1.0]))
    A.data[1], B.data[1] = A.data[0], B.data[0]
    assert (model(x) - layer.base_layer(x)).abs().max() > 1e-3, "of equal experts that lose the same, nothing is left"
    assert_close(model.eval()(x), layer.base_layer(x))


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(num_experts=0), "num_experts"),
        (dict(r=0), "`r`"),
        (dict(ewora_dropout=1.0), "ewora_dropout"),
        (dict(use_dora=True), "`use_dora` means nothing"),
        (dict(megatron_config={"a": 1}), "`megatron_config` means nothing"),
        (dict(layer_replication=[(0, 2)]), "`layer_replication` means nothing"),
        (dict(rank_pattern={"0": -1}), "rank_pattern"),
    ],
    ids=str,
)
def test_what_ewora_refuses(options, text):
    with pytest.raises(graft.ConfigError, match=text):
        ewora(**options)
