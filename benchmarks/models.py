# SPDX-License-Identifier: Apache-2.0
"""Base models: SmolLM2-135M with a small vocabulary, its weights where they are at hand, and plain stacks."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import LlamaConfig, LlamaModel

from examples.demo_lm.model import cache_folder

WEIGHTS = sorted(cache_folder().glob("smollm2-135m-instruct-*/model.safetensors"))
WIDTH, SCALING = 576, 1.37  # a scaling that is no power of two: with those, exact equality proves nothing
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def smollm(
    layers: int = 30, device: str = "cpu", values: bool = True, dtype: torch.dtype = torch.float32
) -> LlamaModel:
    """7 linear layers per block. Without `values`, memory is allocated but not written to."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=WIDTH,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    with torch.device("meta"):
        model = LlamaModel(config).to(dtype).eval()
    if device == "meta":
        return model
    rotary = type(model.rotary_emb)(config)  # its buffers are computed, not loaded
    model.to_empty(device=device)
    model.rotary_emb = rotary
    if values:
        fill(model)
    return model


@torch.no_grad()
def fill(model: LlamaModel) -> None:
    """With the weights of SmolLM2-135M-Instruct where `make demo-lm` has put them, else with random ones."""
    real = safe_open(WEIGHTS[0], "pt") if WEIGHTS else None
    g = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if real is not None:
            p.copy_(real.get_slice(f"model.{name}")[: len(p)])
        elif "norm" in name:
            p.fill_(1.0)
        else:
            p.normal_(0, 0.05, generator=g)


class Stack(nn.Module):
    """`n` small linear layers in blocks of ten."""

    def __init__(self, n: int):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Linear(4, 4) for _ in range(10)) for _ in range(n // 10))


def lora(lib: Any, r: int = 16, targets: Any = LINEAR, **options: Any) -> Any:
    return lib.LoraConfig(r=r, lora_alpha=SCALING * r, target_modules=list(targets), **options)


def stack_config(lib: Any) -> Any:
    return lib.LoraConfig(r=2, lora_alpha=2 * SCALING, target_modules=r"blocks\.\d+\.\d+")


@torch.no_grad()
def randomize(model: nn.Module) -> nn.Module:
    """Values for every adapter: LoRA starts with zeros, which some kernels skip."""
    g = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.normal_(0, 0.02, generator=g)
    return model
