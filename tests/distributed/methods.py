# SPDX-License-Identifier: Apache-2.0
"""The base model, the batch and the adapters of the distributed checks."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import graft

ON = dict(target_modules=["q_proj", "v_proj", "down_proj"])
CONFIGS: dict[str, Any] = {
    "LORA": lambda: graft.LoraConfig(r=4, **ON),
    "DORA": lambda: graft.LoraConfig(r=4, use_dora=True, **ON),
    "IA3": lambda: graft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "ADALORA": lambda: graft.AdaLoraConfig(init_r=4, target_r=2, total_step=100, tinit=10, tfinal=10, **ON),
    "OFT": lambda: graft.OFTConfig(oft_block_size=8, **ON),
    "VERA": lambda: graft.VeraConfig(r=8, target_modules=["q_proj", "o_proj"]),
    "LOHA": lambda: graft.LoHaConfig(r=4, **ON),
    "PROMPT_TUNING": lambda: graft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "PREFIX_TUNING": lambda: graft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
}  # fmt: skip
ROWS, STEPS, RATE = 4, 3, 0.5


def base() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=61, tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config)


def with_method(method: str, seed: int = 1) -> Any:
    """A fresh model with one adapter."""
    model = base()
    torch.manual_seed(seed)
    return graft.get_peft_model(model, CONFIGS[method]())


def batch(rank: int = 0, world: int = 1) -> dict[str, torch.Tensor]:
    """The rows of one of `world` processes."""
    torch.manual_seed(7)
    ids = torch.randint(1, 61, (ROWS, 9))
    n = ROWS // world
    ids = ids[rank * n : (rank + 1) * n]
    return dict(input_ids=ids, labels=ids)
