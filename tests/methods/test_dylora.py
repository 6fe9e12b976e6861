# SPDX-License-Identifier: Apache-2.0
"""DyLoRA by its formula: what a step uses and trains, and the adapters of lower rank within the one that comes out."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graft
from tests.models import seeded
from tests.raised import refuses

R, ALPHA = 4, 6


def net():
    with seeded(0):
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def made(**options):
    with seeded(1):
        options = dict(target_modules=["0"], r=R, lora_alpha=ALPHA, use_dylora=True, init_lora_weights=False) | options
        return graft.get_peft_model(net(), graft.LoraConfig(**options))


def factors(model):
    layer = model.base_model.model[0]
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def with_rank(model, x, b, scale):
    A, B = factors(model)
    base = net()
    return base[2](torch.tanh(base[0](x) + scale * x @ A[:b].T @ B[:, :b].T))


@pytest.mark.parametrize("rs", [False, True])
def test_a_step_uses_the_first_ranks_and_trains_the_last(rs):
    model, x = made(use_rslora=rs), torch.linspace(-1, 1, 18).view(3, 6)
    A, B = factors(model)
    scale = lambda b: ALPHA / (b**0.5 if rs else b)
    drawn = Counter()
    with seeded(2):
        for _ in range(60):
            model.zero_grad()
            y = model(x)
            y.square().sum().backward()
            (b,) = A.grad.any(1).nonzero()[:, 0].tolist()
            assert B.grad.any(0).nonzero()[:, 0].tolist() == [b]
            assert_close(y, with_rank(model, x, b + 1, scale(b + 1)))
            drawn[b] += 1
    assert set(drawn) == set(range(R)) and min(drawn.values()) > 5
    assert_close(model.eval()(x), with_rank(model, x, R, scale(R)))


@pytest.mark.parametrize("rank", [1, 3])
def test_the_first_ranks_are_an_adapter(rank, tmp_path):
    model, x = made().eval(), torch.linspace(-1, 1, 18).view(3, 6)
    before = copy.deepcopy(model.state_dict())
    config, tensors = graft.truncate_lora(model, rank)
    new = graft.get_peft_model(net(), config)
    graft.set_peft_model_state_dict(new, tensors)
    assert_close(new.eval()(x), with_rank(model, x, rank, ALPHA / rank))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    new.save_pretrained(tmp_path)
    assert_close(graft.PeftModel.from_pretrained(net(), tmp_path)(x), new(x))


def test_files_are_plain_loras():
    assert made().peft_config["default"].to_file_dict() == made(use_dylora=False).peft_config["default"].to_file_dict()


def test_rows_and_two_layers_have_one_draw():
    model, x = made(target_modules=["0", "2"]), torch.linspace(-1, 1, 18).view(3, 6)
    with seeded(3):
        model(x, adapter_names=["default", "__base__", "default"]).square().sum().backward()
    layers = [model.base_model.model[i].lora_A["default"].weight for i in (0, 2)]
    assert len({tuple(A.grad.any(1).tolist()) for A in layers}) == 1


def test_what_cannot_be():
    model, x = made(), torch.ones(3, 6)
    refuses(graft.RoutingError, "layer '0' was called in another way", model.base_model.model, x)
    refuses(graft.ConfigError, "between 1 and 4, that of layer '0', got 5", graft.truncate_lora, model, 5)
    for rank in (2.0, "2", None):
        refuses(graft.ConfigTypeError, "rank must be an int", graft.truncate_lora, model, rank)
    with pytest.raises(graft.ConfigError, match="'default' is not plain LoRA or DyLoRA"):
        graft.truncate_lora(graft.get_peft_model(net(), graft.LoHaConfig(target_modules=["0"])), 1)
    refuses(graft.ConfigError, "variant combination", made, use_dora=True)
    refuses(ValueError, "no ranks of a bias", made, lora_bias=True)
