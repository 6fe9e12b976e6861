# SPDX-License-Identifier: Apache-2.0
"""CorDA, against PEFT on the same data."""

from __future__ import annotations

import dataclasses
import sys
import types

import peft
import pytest
import torch
from torch.testing import assert_close

import graft
from graft.train.calibration import watch_calls
from tests import models
from tests.pair import common
from tests.raised import refuses

TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}


@pytest.fixture(scope="module")
def preprocess():
    """PEFT's module imports `attrs` for its dataclass, on which PEFT does not depend."""
    stand_in = types.ModuleType("attr")
    stand_in.dataclass = dataclasses.dataclass
    had = sys.modules.setdefault("attr", stand_in)
    from peft.tuners.lora.corda import preprocess_corda

    if had is stand_in:
        del sys.modules["attr"]
    return {graft: graft.preprocess_corda, peft: preprocess_corda}


def rows(name):
    x = models.inputs(name)
    return [{k: v[i : i + 1] for k, v in x.items()} for i in range(3)]


def config(lib, name, **options):
    cls = graft.CordaConfig if lib is graft else peft.tuners.lora.config.CordaConfig
    return lib.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=TARGETS[name],
        init_lora_weights="corda",
        corda_config=cls(**options),
        rank_pattern={"down_proj": 4},
    )


@pytest.mark.parametrize("how", ["ipm", "kpm"])
@pytest.mark.parametrize("name", TARGETS)
def test_values_are_pefts_up_to_signs(name, how, preprocess):
    made = []
    for lib in (graft, peft):
        base, cfg = models.make(name), config(lib, name, corda_method=how)
        preprocess[lib](base, cfg, lambda b=base: [b(**row) for row in rows(name)])
        model = lib.get_peft_model(base, cfg).eval()
        assert_close(
            models.output(model, models.inputs(name)),
            models.output(models.make(name), models.inputs(name)),
            atol=2e-4,
            rtol=2e-4,
        )
        assert not any(hasattr(m, "eigens") for m in model.modules())
        made.append({k: t.abs() for k, t in common(model.state_dict()).items()})
    assert made[0].keys() == made[1].keys()
    for key, theirs in made[1].items():
        assert_close(made[0][key], theirs, atol=2e-4, rtol=2e-3, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.differs("`CordaConfig.prune_temporary_fields=False`")
@pytest.mark.differs("`preprocess_corda`")
def test_options_of_the_covariance(preprocess, capsys):
    """In half precision, with a progress bar, and with fields that PEFT would leave on modules."""
    made = []
    for lib in (graft, peft):
        base = models.make("llama").half()
        cfg = config(lib, "llama", use_float16_for_covariance=True, verbose=True, prune_temporary_fields=False)
        preprocess[lib](base, cfg, lambda b=base: [b(**row) for row in rows("llama")])
        made.append({n: m.eigens for n, m in base.named_modules() if hasattr(m, "eigens")})
        left = {name for m in base.modules() for name in vars(m) if name in ("sample_count", "covariance_matrix")}
        assert left == (set() if lib is graft else {"sample_count", "covariance_matrix"})
    assert "Collecting eigens" in capsys.readouterr().err
    assert made[0].keys() == made[1].keys()
    for name, ours in made[0].items():
        assert_close(ours.S_WC.float(), made[1][name].S_WC.float(), rtol=5e-2, atol=5e-2)


def test_files_take_the_place_of_data(tmp_path, preprocess):
    run = lambda base: lambda: [base(**row) for row in rows("llama")]
    states = []
    covariances = str(tmp_path / "c" / "covariances.pt")
    for options, data in (
        (dict(covariance_file=covariances, cache_file=str(tmp_path / "eigens.pt")), True),
        (dict(cache_file=str(tmp_path / "eigens.pt")), False),
        (dict(covariance_file=covariances), False),
    ):
        base, cfg = models.make("llama"), config(graft, "llama", **options)
        graft.preprocess_corda(base, cfg, run(base) if data else None)
        states.append(graft.get_peft_model(base, cfg).state_dict())
    base, cfg = models.make("llama"), config(peft, "llama", cache_file=str(tmp_path / "eigens.pt"))
    preprocess[peft](base, cfg)
    states.append(peft.get_peft_model(base, cfg).state_dict())
    for state in states[1:]:
        for key, t in state.items():
            assert_close(t, states[0][key], atol=1e-5, rtol=1e-5)
    torch.save({"model.layers.0.self_attn.q_proj": torch.eye(24)}, covariances)
    with pytest.raises(graft.CheckpointError, match=r"covariances.pt lacks 'model"):
        graft.preprocess_corda(models.make("llama"), config(graft, "llama", covariance_file=covariances))
    (tmp_path / "eigens.pt").write_bytes(b"nonsense")
    with pytest.raises(graft.CheckpointError, match="delete it, and graft makes it again"):
        graft.preprocess_corda(models.make("llama"), config(graft, "llama", cache_file=str(tmp_path / "eigens.pt")))


def test_another_model_may_be_watched():
    with models.seeded(0):
        model, watched = models.Idle().train(), models.Idle().train()
        x = torch.randn(40, 6)
    cfg = graft.LoraConfig(r=2, target_modules=["a"], init_lora_weights="corda", corda_config={})
    graft.preprocess_corda(model, cfg, lambda: watched(x), watched)
    assert model.a.eigens.S_WC.shape == (2,) and not hasattr(watched.a, "eigens") and watched.training


@pytest.mark.differs("`preprocess_corda`, `preprocess_loraga`, EVA: layers that see no data")
def test_data_that_say_too_little():
    def attempt(run, *names, text, kind=graft.CalibrationError, **options):
        model = models.Idle()
        cfg = graft.LoraConfig(
            **dict(r=2, target_modules=list(names), init_lora_weights="corda", corda_config=graft.CordaConfig())
            | options
        )
        refuses(kind, text, graft.preprocess_corda, model, cfg, run and (lambda: run(model)))
        assert not model.a._forward_hooks and not hasattr(model.a, "eigens") and model.training

    x = torch.randn(30, 6)
    attempt(None, "a", text="run_model must be specified")
    attempt(lambda m: m(x), "a", "b", text=r"gave no input for 1 of 2 layers: \[b\]")
    attempt(lambda m: None, "a", text=r"gave no input for 1 of 1 layers: \[a\]")
    attempt(lambda m: m(x * float("nan")), "a", text="inputs of layer 'a': NaN")
    attempt(lambda m: m(x * 0), "a", text="zero throughout")
    attempt(
        lambda m: m(x), "a", text="prepares init_lora_weights='corda'", kind=graft.ConfigError, init_lora_weights=True
    )
    with pytest.raises(graft.CalibrationError, match=r"call|run `preprocess_corda` first"):
        graft.get_peft_model(models.Idle(), graft.LoraConfig(target_modules=["a"], r=2, init_lora_weights="corda"))
    refuses(ValueError, "`corda_method` must be one of 'ipm', 'kpm', got 'x'", graft.CordaConfig, corda_method="x")


def test_a_failed_injection_keeps_what_was_measured():
    model = models.Idle()
    x = torch.randn(30, 6)
    cfg = graft.LoraConfig(r=2, target_modules=["a"], init_lora_weights="corda", corda_config={})
    graft.preprocess_corda(model, cfg, lambda: model(x))
    weight, eigens = model.a.weight.clone(), model.a.eigens
    wrong = graft.LoraConfig(r=2, target_modules=["a", "b"], init_lora_weights="corda", corda_config={})
    refuses(graft.CalibrationError, "layer 'b'", graft.get_peft_model, model, wrong)
    assert torch.equal(model.a.weight, weight) and model.a.eigens is eigens
    other = graft.LoraConfig(r=3, target_modules=["a"], init_lora_weights="corda", corda_config={})
    with pytest.raises(graft.CalibrationError, match=r"Matrix S size mismatch: \(2,\) vs. \(3,\) on layer 'a'"):
        graft.get_peft_model(model, other)
    graft.get_peft_model(model, cfg)


def test_a_layer_that_is_watched_keeps_its_output():
    layer, x, seen = torch.nn.Linear(3, 2), torch.ones(1, 3), []

    def see(key, args, y):
        seen.append((key, args, y))
        return torch.zeros_like(y)

    with watch_calls({"fc": layer}, see):
        y = layer(x)
    assert y.any() and seen[0][0] == "fc" and seen[0][1][0] is x and seen[0][2] is y
    layer(x)
    assert len(seen) == 1
