# SPDX-License-Identifier: Apache-2.0
"""LoRA-GA, against PEFT on the same data."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graft
from tests import models
from tests.conformance.stores import held
from tests.pair import common
from tests.raised import refuses

TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}


def prepared(lib, name, steps=2, cache=None, **options):
    base = models.make(name)
    cfg = lib.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=TARGETS[name],
        init_lora_weights="lora_ga",
        lora_ga_config=lib.LoraGAConfig(**options),
    )
    x = models.inputs(name)

    def step():
        for i in range(steps):
            base(**{k: v[i:] for k, v in x.items()}, labels=x["input_ids"][i:]).loss.backward()

    lib.preprocess_loraga(base, cfg, step, cache_file=cache)
    return base, cfg


@pytest.mark.parametrize(
    "name, direction, scale",
    [
        ("llama", "ArB2r", "stable"),
        ("llama", "ArBr", "weight_svd"),
        ("llama", "A2rBr", "gd_scale"),
        ("llama", "random", "unit"),
        ("gpt2", "ArB2r", "weight_svd"),
    ],
)
def test_values_are_pefts_up_to_signs(name, direction, scale):
    made = []
    for lib in (graft, peft):
        base, cfg = prepared(lib, name, direction=direction, scale=scale)
        models.seed(1)
        model = lib.get_peft_model(base, cfg).eval()
        x = models.inputs(name)
        assert_close(models.output(model, x), models.output(models.make(name), x), atol=2e-4, rtol=2e-4)
        made.append({k: t.abs() for k, t in common(model.state_dict()).items()})
    assert made[0].keys() == made[1].keys()
    for key, theirs in made[1].items():
        assert_close(made[0][key], theirs, atol=2e-4, rtol=2e-3, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.differs('LoRA-GA\'s scale "stable" on Conv1D')
def test_the_stable_scale_counts_outputs():
    """Of Conv1D PEFT counts inputs, since it takes the first dimension of the weight as it is stored."""
    norms = {}
    for scale in ("stable", "unit"):
        base, cfg = prepared(graft, "gpt2", scale=scale, stable_gamma=9)
        model = graft.get_peft_model(base, cfg)
        norms[scale] = model.get_base_model().transformer.h[0].attn.c_attn.lora_B["default"].weight.norm()
    assert_close(norms["stable"] / norms["unit"], torch.tensor(72**0.25 / 3), atol=1e-3, rtol=1e-3)


def test_gradients_are_stored_once(tmp_path):
    cache = str(tmp_path / "deep" / "gradients.pt")
    first, _ = prepared(graft, "llama", cache=cache)
    for lib in (graft, peft):
        again, _ = prepared(lib, "llama", steps=0, cache=cache)
        for (name, a), b in zip(first.named_modules(), again.modules()):
            if hasattr(a, "_peft_loraga_grad"):
                assert torch.equal(a._peft_loraga_grad, b._peft_loraga_grad), name
    torch.save({}, cache)
    with pytest.raises(graft.CheckpointError, match=r"lacks 'model.layers.0.self_attn.q_proj._peft_loraga_grad'"):
        prepared(graft, "llama", cache=cache)


def test_default_targets_are_those_of_the_architecture():
    found = []
    for lib in (graft, peft):
        base, cfg = (
            models.make("llama"),
            lib.LoraConfig(r=2, init_lora_weights="lora_ga", lora_ga_config=lib.LoraGAConfig()),
        )
        x = models.inputs("llama")
        lib.preprocess_loraga(base, cfg, lambda b=base, x=x: b(**x, labels=x["input_ids"]).loss.backward())
        found.append({n for n, m in base.named_modules() if hasattr(m, "_peft_loraga_grad")})
    assert found[0] == found[1] and all(n.endswith(("q_proj", "v_proj")) for n in found[0])


def config(*names, **options):
    return graft.LoraConfig(
        **dict(r=2, target_modules=list(names), init_lora_weights="lora_ga", lora_ga_config={}) | options
    )


@pytest.mark.differs('"lora_ga" without gradients')
def test_data_that_say_too_little():
    x = torch.randn(5, 6)

    def attempt(step, *names, text, kind=graft.CalibrationError, model=None, **options):
        model = model or models.Idle().eval()
        model.a.bias.requires_grad = False
        refuses(kind, text, graft.preprocess_loraga, model, config(*names, **options), lambda: step(model))
        assert not hasattr(model.a, "_peft_loraga_grad") and not model.a._backward_hooks and not model.training
        assert [p.requires_grad for p in model.parameters()][-3:] == [False, True, True]
        assert all(p.grad is None for p in model.parameters())

    attempt(lambda m: m(x).sum().backward(), "a", "b", text=r"gave no gradient for 1 of 2 layers: \[b\]")
    attempt(lambda m: m(x), "a", text=r"gave no gradient for 1 of 1 layers: \[a\]")
    attempt(lambda m: (m(x) * float("inf")).sum().backward(), "a", text="gradient of layer 'a' is not finite")
    with pytest.raises(graft.CalibrationError, match=r"no gradient for layer 'a' .*Call preprocess_loraga"):
        graft.get_peft_model(models.Idle(), config("a"))
    quantized = models.Idle()
    quantized.a = held(quantized.a)
    with pytest.raises(ValueError, match=r"LoRA-GA does not support quantized models. Found quantized module: 'a'"):
        graft.preprocess_loraga(quantized, config("a"), lambda: None)
    with pytest.raises(ValueError, match="If you want to use LoRA-GA"):
        graft.preprocess_loraga(models.Idle(), graft.LoraConfig(target_modules=["a"]), lambda: None)
    table = nn.ModuleDict({"emb": nn.Embedding(5, 5)})
    refuses(ValueError, "No supported layers found", graft.preprocess_loraga, table, config("emb"), lambda: None)
    for wrong in (dict(direction="x"), dict(scale="x"), dict(stable_gamma=0)):
        refuses(ValueError, f"`{next(iter(wrong))}` must be", graft.LoraGAConfig, **wrong)


def test_gradients_that_were_there_stay():
    model = models.Idle()
    model(torch.randn(3, 6)).sum().backward()
    before = model.a.weight.grad.clone()
    graft.preprocess_loraga(model, config("a"), lambda: model(torch.randn(3, 6)).sum().backward())
    assert torch.equal(model.a.weight.grad, before) and model.a.weight.requires_grad
