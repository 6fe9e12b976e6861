# SPDX-License-Identifier: Apache-2.0
"""T-LoRA: LyCORIS's numbers, and the timestep that a call gives."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

import graft
from graft.methods.tlora import ranks
from tests.models import seeded
from tests.raised import refuses, warns

ORACLE = load_file(Path(__file__).parent / "fixtures" / "tlora.safetensors")  # by make_tlora.py
NAMES = ("P", "lambda", "Q")


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.conv = nn.Linear(7, 6), nn.Conv2d(1, 6, 3)

    def forward(self, sample, timestep, scale=1.0):
        return self.inner(sample) * scale


def base():
    with seeded(0):
        model = Denoiser()
    model.inner.load_state_dict({"weight": ORACLE["weight"], "bias": ORACLE["bias"]})
    return model


def made(**options):
    options = dict(r=4, lora_alpha=6, target_modules=["inner"]) | options
    with seeded(1):
        return graft.get_peft_model(base(), graft.TLoraConfig(**options)).eval()


def tensors(model, name="inner"):
    layer = model.base_model.model.get_submodule(name)
    return {x + zero: getattr(layer, f"tlora_{x}{zero}")["default"] for x in NAMES for zero in ("", "0")}


@pytest.mark.parametrize("kind", ["principal", "last", "middle"])
@torch.no_grad()
def test_lycoris_starts_so_and_adds_the_same(kind):
    model = made(sig_type=kind, alpha_rank_scale=0.7)
    held, theirs = tensors(model), {name.partition(".")[2]: t for name, t in ORACLE.items() if name.startswith(kind)}
    for P, S, Q in (("P", "lambda", "Q"), ("P0", "lambda0", "Q0")):  # signs may differ
        assert_close(held[P] * held[S] @ held[Q], theirs["P0"] * theirs["lambda0"] @ theirs["Q0"], atol=1e-6, rtol=1e-5)
    for name, t in held.items():
        t.copy_(theirs[name])
    x, steps = ORACLE["x"], (0, 130, 480, 999)
    for t in steps:
        assert_close(model(x, t), base()(x, t) + x @ theirs[str(t)].T)
    mixed = model(x, torch.tensor(steps[1:]))
    for i, t in enumerate(steps[1:]):
        assert_close(mixed[i], model(x, t)[i])


@pytest.mark.parametrize("a", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("r, least", [(8, 2), (3, 3), (101, 1)])
def test_ranks_follow_the_formula(a, r, least):
    config = graft.TLoraConfig(r=r, min_rank=least, alpha_rank_scale=a)
    t = torch.arange(0, 1001)
    share = [
        ((1000 - i) * (r - least)) // 1000 if a == 1 else ((1000 - i) / 1000) ** a * (r - least) for i in range(1001)
    ]
    found, wanted = ranks(t, config), torch.tensor([math.floor(s + 1e-9) + least for s in share]).float()
    assert torch.equal(found, wanted) if a == 1 else (found != wanted).sum() <= 2  # at whole numbers, by rounding


def test_who_gives_the_timestep():
    model, x = made(init_weights=False), ORACLE["x"]
    plain = model(x, 700)
    assert torch.equal(model(x, timestep=torch.tensor([700])), plain)
    assert torch.equal(model(sample=x, timestep=700.0), plain)
    assert torch.equal(model(x, torch.tensor([700] * 3)), plain)
    with model.timestep(700):
        assert torch.equal(model(x, 3), plain)  # the block has the last word
        assert torch.equal(model.base_model.model(x, 3), plain)
    assert not torch.equal(model(x, 3), plain)
    with model.disable_adapter():
        assert torch.equal(model(x, None), base()(x, None))


def test_a_mixed_model_gives_the_timestep_in_a_block():
    with seeded(1):
        model = graft.get_peft_model(base(), graft.LoraConfig(target_modules=["conv"]), "plain", mixed=True).eval()
        refuses(AttributeError, "timestep", lambda: model.timestep(3))
        model.add_adapter("t", graft.TLoraConfig(target_modules=["inner"], init_weights=False))
    model.set_adapter("t")
    x = ORACLE["x"]
    with model.timestep(700):
        inside = model.base_model.model(x, 3)
    assert torch.equal(inside, model(x, 700)) and not torch.equal(inside, model(x, 3))
    model.set_adapter("plain")
    model.delete_adapter("t")
    refuses(AttributeError, "timestep", lambda: model.timestep(3))


@pytest.mark.parametrize("active", [True, False])
def test_copies_of_a_batch_have_the_timesteps_of_its_rows(active):
    model, x, steps = made(init_weights=False), ORACLE["x"], torch.tensor([5, 990, 400])
    with seeded(3):
        model.add_adapter("two", graft.TLoraConfig(r=4, target_modules=["inner"], init_weights=False))
    value = graft.Parallel("two", "default")
    wants = [model(x, steps, compose=graft.Stack(name)) for name in value.children]
    assert not torch.equal(*wants)
    call = {} if active else {"compose": value}
    if active:
        model.set_adapter(value)
    with model.timestep(steps):
        for got in (model(x, 0, **call), model(sample=x, timestep=0, **call)):
            assert_close(got, torch.cat(wants))
        assert_close(model(x, 0, compose=graft.Stack("two")), wants[0])
    for given in (steps, steps.tolist(), (*steps.tolist(),)):
        assert_close(model(x, timestep=given, **call), torch.cat(wants))
    assert_close(model(x, steps, **call), torch.cat(wants))
    for rows in (dict(adapter_names=["two", "default", "two"]), dict(compose=value)):
        for wrong in (steps[:2], torch.cat([steps, steps[:2]])):
            with pytest.raises(graft.RoutingError, match="Give one timestep for each row"), model.timestep(wrong):
                model(x, 0, **rows)
    with model.timestep(400):
        assert_close(model(x, 0, **call)[2], wants[0][2])


def test_what_a_call_lacks():
    model, x = made(), ORACLE["x"]
    refuses(graft.RoutingError, r"know the timestep", model, x, None)
    refuses(graft.RoutingError, r"get_peft_model returns", model.base_model.model, x, 5)
    refuses(graft.RoutingError, r"between 0 and max_timestep=1000.*'default'", model, x, torch.tensor([3, 1001, 5]))
    refuses(graft.RoutingError, r"one per row, got torch.int64 of shape \(1, 3\)", model, x, torch.tensor([[3, 4, 5]]))
    refuses(graft.RoutingError, "layer 'inner' received 3 rows for 2 timesteps", model, x, torch.tensor([3, 4]))


def test_a_file_holds_the_start(tmp_path):
    model, x = made(sig_type="last"), ORACLE["x"]
    with torch.no_grad():
        for name, t in tensors(model).items():
            if not name.endswith("0"):
                t.add_(0.1)
    model.save_pretrained(tmp_path)
    other = base()
    with torch.no_grad():
        other.inner.weight.mul_(-2)
        change = model(x, 30) - base()(x, 30)
        loaded = warns(UserWarning, "weights", graft.PeftModel.from_pretrained, other, tmp_path)
        assert_close(loaded(x, 30) - other.get_submodule("inner").base_layer(x), change)


@pytest.mark.parametrize("options, error, text", [
    (dict(min_rank=5), graft.ConfigError, "between 1 and r=4"),
    (dict(max_timestep=0), graft.ConfigError, "`max_timestep` must be positive"),
    (dict(r=7), graft.ConfigError, "layer 'inner'.*smaller r than 7"),
    (dict(r=3, min_rank=3, rank_pattern={"inner": 2}), graft.ConfigError, "layer 'inner' has r=2"),
    (dict(sig_type="first"), TypeError, "sig_type"),
])  # fmt: skip
def test_configs_that_cannot_be(options, error, text):
    refuses(error, text, made, **options)


def test_gradients_through_a_checkpointed_block():
    model, x = made(init_weights=False), ORACLE["x"].requires_grad_()
    run = model.base_model.model.inner.forward
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            model.base_model.model.inner.forward = lambda x: torch.utils.checkpoint.checkpoint(
                run, x, use_reentrant=False
            )
        model.zero_grad()
        model(x, 400).square().sum().backward()
        grads.append(tensors(model)["Q"].grad.clone())
    assert grads[0].any() and torch.equal(*grads)


@pytest.mark.parametrize("t", [0, 430.0, 1000])
def test_at_a_timestep_it_is_lora(t):
    for target in ("inner", "conv"):
        model = made(target_modules=[target])
        with seeded(4), torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p))
        config, tensors = graft.convert_to_lora(model, rank=6, at={"timestep": t})  # the most of these layers
        lora = graft.get_peft_model(base(), config).eval()
        graft.set_peft_model_state_dict(lora, tensors)
        x = torch.linspace(-1, 1, 21).view(3, 7) if target == "inner" else torch.linspace(-1, 1, 75).view(3, 1, 5, 5)
        with model.timestep(t):
            y = getattr(model.base_model.model, target)(x)
        assert_close(getattr(lora.base_model.model, target)(x), y, rtol=1e-4, atol=1e-4)


def test_as_lora_it_has_to_know_the_timestep():
    model = made()
    refuses(TypeError, r"follows `timestep` of a call: say which, at=", graft.convert_to_lora, model, rank=2)
    with pytest.raises(graft.ConfigError, match="between 0 and max_timestep=1000, got 1001"):
        graft.convert_to_lora(model, rank=2, at={"timestep": 1001})
    with pytest.raises(graft.ConfigError, match=r"names \['task_ids'\], and adapter 'default' follows \['timestep'\]"):
        graft.convert_to_lora(model, rank=2, at={"task_ids": 1})
