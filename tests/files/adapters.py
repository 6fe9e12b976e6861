# SPDX-License-Identifier: Apache-2.0
"""Adapters in files for tests of what servers do, made by graft and by PEFT on tiny models, each once in a process."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch

import graft
from tests.models import make, seeded

LISTED = ["q_proj", "v_proj", "up_proj"]
LORA: dict[str, dict[str, Any]] = {
    "plain": dict(lora_alpha=4),
    "scaled": dict(lora_alpha=6),
    "patterns": dict(rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.mlp.up_proj": 10}),
    "rslora": dict(use_rslora=True),
    "regex": dict(target_modules=r".*layers\.1\..*(q|v)_proj"),
    "paths": dict(target_modules=["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]),
    "one layer": dict(layers_to_transform=[1]),
    "q": dict(target_modules=["q_proj"]),
    "pissa": dict(init_lora_weights="pissa"),
    "olora": dict(init_lora_weights="olora", rank_pattern={"q_proj": 2}),
    "dora": dict(use_dora=True),
    "bias": dict(lora_bias=True),
    "base bias": dict(bias="all"),
    "alora": dict(alora_invocation_tokens=[3, 4], task_type="CAUSAL_LM"),
    "replicated": dict(layer_replication=[(0, 2), (1, 2)]),
    "velora": dict(velora_config=graft.VeloraConfig()),
    "monteclora": dict(monteclora_config=graft.MontecloraConfig()),
    "kasa": dict(kasa_config=graft.KasaConfig()),
    "qalora": dict(use_qalora=True, qalora_group_size=3),
    "bdlora": dict(
        use_bdlora=graft.BdLoraConfig(
            nblocks=2, target_modules_bd_a=["up_proj"], target_modules_bd_b=["q_proj"], match_strict=False
        )
    ),
    "whole head": dict(modules_to_save=["lm_head"]),
    "whole norm": dict(modules_to_save=["model.norm"]),
    "rows": dict(trainable_token_indices=[1, 5]),
    "embedding": dict(target_modules=["q_proj", "v_proj", "embed_tokens"]),
    "lm_head": dict(target_modules=["q_proj", "v_proj", "lm_head"]),
    "high": dict(r=17, rank_pattern={"up_proj": 130}),
}


@cache
def home() -> Path:
    path = Path(tempfile.mkdtemp(prefix="graft-adapters-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def quietly(run, *args: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run(*args, **options)


@cache
def base(name: str = "llama") -> str:
    """The folder of a model."""
    path = home() / f"base-{name}"
    quietly(make(name).save_pretrained, path)
    return str(path)


def model(name: str, lib: Any = graft) -> Any:
    """A model with an adapter whose update is of order one."""
    options = dict(r=4, lora_alpha=8, target_modules=LISTED) | LORA[name]
    return quietly(moved, make("llama"), lib.LoraConfig(**options), lib)


def moved(on: Any, config: Any, lib: Any = graft) -> Any:
    with seeded(2):
        made = lib.get_peft_model(on, config)
        for p in made.parameters():
            if p.requires_grad:
                p.data.add_(torch.randn(p.shape), alpha=0.2)
    return made.eval()


@cache
def folder(name: str) -> str:
    """The folder of an adapter."""
    path = home() / name.replace(" ", "-")
    how, _, of = name.rpartition("/")
    if how in ("peft", "bin"):
        made = model(of, peft if how == "peft" else graft)
        quietly(made.save_pretrained, path, safe_serialization=how != "bin")
    elif how == "method":
        config = getattr(graft, of)(target_modules=LISTED)
        quietly(moved(make("llama"), config).save_pretrained, path)
    elif how == "conv":
        quietly(moved(make(of), graft.LoraConfig(r=2, target_modules=["conv"])).save_pretrained, path)
    elif how == "resized":
        on = make("llama")
        quietly(on.resize_token_embeddings, 44)
        quietly(moved(on, graft.LoraConfig(r=2, target_modules=["embed_tokens"])).save_pretrained, path)
    else:
        quietly(model(name).save_pretrained, path)
    return str(path)
