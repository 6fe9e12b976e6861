# SPDX-License-Identifier: Apache-2.0
"""QA-LoRA against PEFT's mathematics, which PEFT itself runs on GPTQ layers alone, and against a dense update."""

from __future__ import annotations

import peft
import pytest
import torch
from peft.tuners.lora.variants import QALoraLinearVariant
from torch import nn
from torch.testing import assert_close

import graft
from tests.models import nudged, seeded

G, R, IN, OUT = 4, 3, 20, 12


def config(lib=graft, **options):
    return lib.LoraConfig(
        **dict(r=R, lora_alpha=5, target_modules=["0"], use_qalora=True, qalora_group_size=G) | options
    )


def net() -> nn.Sequential:
    with seeded(0):
        return nn.Sequential(nn.Linear(IN, OUT))


def fresh(lib=graft, **options):
    """PEFT's layer is given the variant as its GPTQ layer would be."""
    base = net()
    torch.manual_seed(1)
    model = lib.get_peft_model(base, config(lib, **options))
    if lib is peft:
        layer = model.base_model.model[0]
        QALoraLinearVariant.init(layer, "default", config(peft, **options))
        layer.lora_variant["default"] = QALoraLinearVariant()
    return model


def inputs(rows=70):
    with seeded(2):
        return torch.randn(2, rows, IN, requires_grad=True)


@pytest.mark.parametrize("init", [True, False])
def test_initial_values_are_pefts(init):
    ours, theirs = fresh(init_lora_weights=init).state_dict(), fresh(peft, init_lora_weights=init).state_dict()
    assert ours.keys() == theirs.keys()
    for name, t in theirs.items():
        assert torch.equal(ours[name], t), name


@pytest.mark.parametrize("rows", [3, 70])
def test_outputs_and_gradients_are_pefts(rows):
    results = []
    for model in (nudged(fresh()), nudged(fresh(peft))):
        x = inputs(rows)
        y = model(x)
        y.square().sum().backward()
        results.append((y, x.grad, *(p.grad for n, p in model.named_parameters() if "lora_" in n)))
    for a, b in zip(*results, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.differs("`use_qalora` on other layers than GPTQ's; merging it")
def test_the_update_is_constant_within_a_group():
    """ΔW = s B A E, where E (in / g, in) has the means times in / g. PEFT: NotImplementedError."""
    model = nudged(fresh())
    layer = model.base_model.model[0]
    E = torch.zeros(IN // G, IN)
    for k in range(IN // G):
        E[k, k * G : (k + 1) * G] = (IN // G) / G
    wanted = (5 / R) * layer.lora_B["default"].weight @ layer.lora_A["default"].weight @ E
    assert_close(layer.get_delta_weight("default"), wanted)
    x, y = inputs(), model(inputs())
    assert_close(model.merge_and_unload()(x), y, rtol=1e-5, atol=1e-5)


def test_hooks_on_the_factors_run():
    model, x, seen = nudged(fresh()), inputs(), []
    plain = model(x)
    model.base_model.model[0].lora_A["default"].register_forward_hook(lambda m, args, y: seen.append(y.shape))
    assert_close(model(x), plain)
    assert seen == [(2, 70, R)]


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(qalora_group_size=7), r"\(20\) to be divisible by 'qalora_group_size' \(7\)"),
        (dict(qalora_group_size=0), r"divisible by 'qalora_group_size' \(0\)"),
        (dict(init_lora_weights="olora"), "init_lora_weights='olora' cannot fill"),
        (dict(use_dora=True), r"unsupported variant combination: \('use_dora', 'use_qalora'\)"),
    ],
)
def test_refused(options, text):
    base = net()
    weight = base[0].weight.clone()
    with pytest.raises(graft.ConfigError, match=text):
        graft.get_peft_model(base, config(**options))
    assert type(base[0]) is nn.Linear and torch.equal(base[0].weight, weight)
