# SPDX-License-Identifier: Apache-2.0
"""The starts of LoHa: Khatri-Rao's, as LoRA learns, and ABBA's, from the weight."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graft
from tests.models import seeded

NAMES = [f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b")]


def net():
    with seeded(0):
        return nn.Sequential(nn.Linear(6, 5), nn.Conv2d(1, 3, 2))


def parts(target="0", **options):
    with seeded(1):
        model = graft.get_peft_model(net(), graft.LoHaConfig(target_modules=[target], r=2, alpha=3, **options))
    return model, [getattr(model.base_model.model.get_submodule(target), name)["default"] for name in NAMES]


def test_files_say_it_where_it_is_set():
    assert "use_khatri_rao" not in graft.LoHaConfig().to_file_dict()
    assert graft.LoHaConfig(use_khatri_rao=True).to_file_dict()["use_khatri_rao"] is True


@pytest.mark.filterwarnings("ignore:With use_khatri_rao")
def test_the_first_step_of_khatri_rao_is_loras():
    model, (a, b, c, d) = parts(use_khatri_rao=True)
    x = torch.linspace(-1, 1, 18).view(3, 6)
    assert torch.equal(model.base_model.model[0](x), net()[0](x))
    assert_close(c @ d, torch.ones(5, 6))
    model.base_model.model[0](x).square().sum().backward()
    lora = graft.get_peft_model(net(), graft.LoraConfig(target_modules=["0"], r=2, lora_alpha=3))
    layer = lora.base_model.model[0]
    layer.lora_A["default"].weight.data.copy_(b)
    layer(x).square().sum().backward()
    assert_close(a.grad, layer.lora_B["default"].weight.grad)
    assert not any(p.grad.any() for p in (b, c, d))


def test_abba_begins_with_the_weight():
    _, (a, b, c, d) = parts(init_weights="abba")
    U, S, V = torch.linalg.svd(net()[0].weight)
    assert_close(a @ b, (U[:, :2] * S[:2]) @ V[:2])
    assert_close(a.norm(dim=0), b.norm(dim=1))
    assert not c.any() and d.abs().max() <= 1 and d.abs().max() > 0.4  # √(6 / fan_in), fan_in 6


def test_a_file_needs_no_weight_again(tmp_path):
    model, values = parts(init_weights="abba")
    model.save_pretrained(tmp_path)
    base = net()
    with torch.no_grad():
        base[0].weight.mul_(2)
    with pytest.warns(UserWarning, match="weights"):
        loaded = graft.PeftModel.from_pretrained(base, tmp_path)
    for name, value in zip(NAMES, values):
        assert torch.equal(getattr(loaded.base_model.model[0], name)["default"], value)


@pytest.mark.parametrize("options, error, text", [
    (dict(target="1", use_khatri_rao=True, use_effective_conv2d=True), graft.ConfigError, "no effect.*'default'"),
    (dict(target="1", init_weights="abba", use_effective_conv2d=True), ValueError, "factors of kernels"),
    (dict(target="1", init_weights="abba", r=4), graft.ConfigError, "layer '1'.*smaller r than 4"),
    (dict(init_weights="abba", use_khatri_rao=True), graft.ConfigError, "are two starts"),
    (dict(init_weights="ABBA"), TypeError, "init_weights"),
])  # fmt: skip
def test_starts_that_cannot_be(options, error, text):
    options = dict(r=2, alpha=3) | options
    target, r, alpha = (options.pop(name, default) for name, default in (("target", "0"), ("r", 2), ("alpha", 3)))
    with pytest.raises(error, match=text):
        graft.get_peft_model(net(), graft.LoHaConfig(target_modules=[target], r=r, alpha=alpha, **options))
