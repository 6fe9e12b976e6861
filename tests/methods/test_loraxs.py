# SPDX-License-Identifier: Apache-2.0
"""LoRA-XS and LoRA-SB by their formulas: no other library has them."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graft
from tests.conformance.stores import held
from tests.looks import layers
from tests.models import seeded
from tests.raised import refuses


def net():
    with seeded(0):
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def config(**options):
    return graft.LoraXsConfig(**dict(r=2, lora_alpha=3, target_modules=["0", "2"]) | options)


def best(W, r):
    U, S, V = torch.linalg.svd(W)
    return (U[:, :r] * S[:r]) @ V[:r]


def test_r_stands_between_the_largest_singular_components():
    base = net()
    model = graft.get_peft_model(net(), config())
    for name, layer in layers(model).items():
        W = base.get_submodule(name).weight
        A, B, R = (getattr(layer, f"loraxs_{x}")["default"] for x in "ABR")
        assert_close(B @ A, best(W, 2))
        assert_close(B.T @ B, torch.eye(2))
        assert not R.any()
        R.data.copy_(torch.eye(2))
        assert_close(layer.get_delta_weight("default"), 1.5 * best(W, 2))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 2 * 2


def test_signs_do_not_depend_on_the_decomposition(monkeypatch):
    first = graft.get_peft_model(net(), config()).state_dict()
    svd = torch.linalg.svd

    def turned(W, full_matrices=True):
        U, S, V = svd(W, full_matrices=full_matrices)
        return -U, S, -V

    monkeypatch.setattr(torch.linalg, "svd", turned)
    for name, t in graft.get_peft_model(net(), config()).state_dict().items():
        assert_close(t, first[name])


def test_a_rank_that_the_weight_lacks_is_refused():
    refuses(graft.ConfigError, r"layer '2'.*\(4, 5\).*smaller r than 5", graft.get_peft_model, net(), config(r=5))


def sb(step=0.02, model=None, **options):
    model, cfg, x = model or net(), config(init_weights="sb", **options), torch.linspace(-1, 1, 18).view(3, 6)
    graft.preprocess_lorasb(model, cfg, lambda: model(x).square().sum().backward(), step)
    return model, cfg, x


def test_lora_sb_begins_with_the_best_product_for_adamws_first_step(tmp_path):
    base, cfg, x = sb()
    stepped = net()
    stepped(x).square().sum().backward()
    torch.optim.AdamW(stepped.parameters(), lr=0.02, weight_decay=0).step()
    weights = [m.weight.detach().clone() for m in (base[0], base[2])]
    model = graft.get_peft_model(base, cfg)
    for (name, layer), W in zip(layers(model).items(), weights):
        step = stepped.get_submodule(name).weight - W
        assert_close(layer.get_delta_weight("default"), best(step, 2), rtol=1e-4, atol=1e-6)
        assert torch.equal(layer.base_layer.weight, W)
    model.save_pretrained(tmp_path)
    assert_close(graft.PeftModel.from_pretrained(net(), tmp_path)(x), model(x))


def test_lora_sb_says_what_it_lacks():
    with pytest.raises(graft.CalibrationError, match=r"no step for layer '0' .*Call preprocess_lorasb"):
        graft.get_peft_model(net(), config(init_weights="sb"))
    refuses(graft.ConfigError, "Leave save_projection on", config, init_weights="sb", save_projection=False)
    with pytest.raises(graft.ConfigError, match="prepares init_weights='sb', and the config says True"):
        graft.preprocess_lorasb(net(), config(), lambda: None, 0.1)
    refuses(graft.ConfigError, "`step` should be a positive number", sb, step=-1.0)
    packed = net()
    packed[0] = held(packed[0])
    refuses(graft.ConfigError, r"LoRA-SB does not support quantized models.*'0'", sb, model=packed)


def test_a_refused_injection_leaves_the_step():
    model, cfg, _ = sb()
    step = model[0]._graft_lorasb_step
    model[2].__dict__.pop("_graft_lorasb_step")
    refuses(graft.CalibrationError, "layer '2'", graft.get_peft_model, model, cfg)
    assert model[0]._graft_lorasb_step is step
