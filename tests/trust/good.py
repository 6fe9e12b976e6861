# SPDX-License-Identifier: Apache-2.0
"""Good adapter folders of every method, as bytes by file name: what the fuzzer damages."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

import graft
from tests import models
from tests.prompts import samples as prompts
from tests.samples import SAMPLES, Sample

CONFIG, TENSORS, BIN = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
Folder = dict[str, bytes]
_OTHERS = {  # (method, name, model) beside the plain ones
    ("LORA", "head", "mlp"),
    ("LORA", "bias_all", "mlp"),
    ("LORA", "bias_lora_only", "mlp"),
    ("LORA", "dora", "mlp"),
    ("LORA", "kasa", "mlp"),
    ("LORA", "dora_pissa", "mlp"),
    ("LORA", "patterns", "llama"),
    ("LORA", "regex", "llama"),
    ("LORA", "classify", "bert-seq"),
    ("LORA", "lora_bias", "mlp"),
    ("LORA", "plain", "embedding"),
    ("LORA", "plain", "conv2d"),
    ("VERA", "unsaved", "mlp"),
    ("VBLORA", "topk_saved", "mlp"),
    ("OFT", "coft", "mlp"),
    ("MISS", "bat", "mlp"),
    ("TRAINABLE_TOKENS", "rows", "embedding"),
    ("LORA", "lm_head", "llama"),
    ("LORA", "layers", "mlp"),
}


@dataclass(frozen=True)
class Seed:
    """A good adapter folder and the base model that it is for."""

    name: str
    method: str
    model: str
    is_prompt: bool
    files: Folder  # type: ignore[type-arg]

    def __hash__(self) -> int:
        return hash(self.name)


def samples() -> list[tuple[Sample, bool]]:
    found = [s for s in SAMPLES if s.name == "plain" and s.model == "mlp"]
    found += [s for s in SAMPLES if (s.method, s.name, s.model) in _OTHERS and s not in found]
    pruned = dict(target_modules=["lin0", "fc1"], init_r=4, target_r=2, total_step=9)
    found += [Sample("ADALORA", "plain", "mlp", pruned)]
    found += [Sample("ADAPTION_PROMPT", "plain", "llama", dict(adapter_len=3, adapter_layers=2))]
    rows = [prompts.first(method) for method in prompts.METHODS]
    return [(s, False) for s in found] + [(s, True) for s in rows]


@cache
def base(model: str, is_prompt: bool) -> nn.Module:
    return prompts.make(model) if is_prompt else models.make(model)


def values_of(model: nn.Module) -> None:
    """Give every tensor that a file of the adapter holds a value of its own."""
    g = torch.Generator().manual_seed(5)
    tensors = graft.get_peft_model_state_dict(model)
    graft.set_peft_model_state_dict(
        model,
        {k: t + 0.1 * torch.randn(t.shape, generator=g) if t.is_floating_point() else t for k, t in tensors.items()},
    )


@cache
def seeds() -> tuple[Seed, ...]:
    """All good folders; those of LoRA on the MLP as torch files, too."""
    out = []
    with warnings.catch_warnings(), TemporaryDirectory() as place:
        warnings.simplefilter("ignore")
        for sample, is_prompt in samples():
            model = (prompts if is_prompt else models).make(sample.model)  # type: ignore[attr-defined]
            model = graft.get_peft_model(model, sample.config(graft))
            if sample.name != "topk_saved":
                values_of(model)
            for safe in (True, False):
                folder = f"{place}/{sample}{safe}"
                model.save_pretrained(folder, safe_serialization=safe)
                files = {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.name != "README.md"}
                out.append(Seed(f"{sample}{'' if safe else '-bin'}", sample.method, sample.model, is_prompt, files))
    return tuple(sorted(out, key=lambda seed: seed.name))
