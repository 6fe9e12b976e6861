# SPDX-License-Identifier: Apache-2.0
"""Notes of what factors consist of: every change that a user can make to it is seen."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graft
from graft.core.mixed import FactorSnapshot
from graft.many.bank import Banks
from tests.looks import get_registry
from tests.models import disturb, seeded


def layer_with(**kwargs):
    with seeded(0):
        base = nn.Sequential(nn.Linear(8, 8))
    model = graft.get_peft_model(base, graft.LoraConfig(r=2, target_modules=["0"], **kwargs))
    layer = model.base_model.model[0]
    return layer, layer.methods["default"]


def noted(method):
    unchanged = FactorSnapshot()
    return unchanged, unchanged.record(method, method.factors())


CHANGES = {
    "scaling": lambda layer: layer.scaling.update(default=3.0),
    "module": lambda layer: layer.lora_A.update({"default": nn.Linear(8, 2, bias=False)}),
    "tensor": lambda layer: setattr(layer.lora_B["default"], "weight", nn.Parameter(torch.ones(8, 2))),
    "hook": lambda layer: layer.lora_A["default"].register_forward_hook(lambda *_: None),
    "hook before": lambda layer: layer.lora_B["default"].register_forward_pre_hook(lambda *_: None),
    "forward": lambda layer: setattr(layer.lora_A["default"], "forward", lambda x: x[..., :2]),
    "bias": lambda layer: setattr(layer.lora_B["default"], "bias", nn.Parameter(torch.ones(8))),
    "dropout": lambda layer: layer.lora_dropout.update({"default": nn.Dropout(0.5)}),
    "hook of dropout": lambda layer: layer.lora_dropout["default"].register_forward_hook(lambda *_: None),
    "deletion": lambda layer: layer.lora_A.pop("default"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(change):
    layer, method = layer_with()
    unchanged, known = noted(method)
    assert known and unchanged.is_unchanged()
    change(layer)
    assert not unchanged.is_unchanged()


def test_dropout_that_begins_is_seen():
    layer, method = layer_with(lora_dropout=0.5)
    assert not noted(method.layer.train().methods["default"])[1], "what drops inputs is not noted"
    unchanged, known = noted(method.layer.eval().methods["default"])
    assert known and unchanged.is_unchanged()
    layer.train()
    assert not unchanged.is_unchanged()


@pytest.mark.parametrize("config", [graft.VeraConfig(target_modules=["0"]), graft.LoHaConfig(target_modules=["0"])])
def test_factors_that_are_computed_are_not_noted(config):
    model = graft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
    method = model.base_model.model[0].methods["default"]
    assert not noted(method)[1]


def replace_lora_B(layer):
    layer.lora_B["u"].weight = nn.Parameter(3 * layer.lora_B["u"].weight.detach())


def replace_sdt_B(layer):
    layer.sdt_B["u"] = nn.Parameter(3 * layer.sdt_B["u"].detach())


@pytest.mark.parametrize("kind, replace", [(graft.LoraConfig, replace_lora_B), (graft.SdtConfig, replace_sdt_B)])
def test_a_batch_like_the_last_one_uses_the_present_factors(kind, replace):
    """Factors of LoRA are noted; those of SDT, which are no modules, are not."""
    with seeded(0):
        base, x = nn.Sequential(nn.Linear(16, 16)), torch.randn(4, 16)
        model = graft.get_peft_model(base, kind(r=2, target_modules=["0"]), "u")
        model.add_adapter("v", kind(r=2, target_modules=["0"]))
    disturb(model)
    model.set_requires_grad(["u", "v"])
    layer, own = base[0], {name: [p for _, p in model.adapter_parameters(name)] for name in "uv"}
    banks = Banks({name: (tensors, tensors) for name, tensors in own.items()}, (*model.parameters(),))
    with get_registry(model).call.use_stacks(banks, 1, may_draw=False):
        before, again = (model(x, adapter_names=["u", "u", "v", "v"]) for _ in range(2))
        replace(layer)
        after = model(x, adapter_names=["u", "u", "v", "v"])
    added = before - layer.base_layer(x)
    assert torch.equal(again, before) and torch.equal(after[2:], before[2:])
    assert_close(after[:2], before[:2] + 2 * added[:2])
