# SPDX-License-Identifier: Apache-2.0
"""The size of a file of VB-LoRA."""

from __future__ import annotations

from typing import Any


def savable_parameters(tuner: Any, adapter: str = "default") -> tuple[int, int]:
    """Return how many numbers a file of `adapter` holds, in units of four bytes: VB-LoRA's, and others that train."""
    tuner.check_known([adapter])
    cfg, carriers = tuner.peft_config[adapter], [*tuner.layers.values(), tuner.shared]
    added = {id(slot.tensor) for c in carriers for name in c.adapters for slot in c.slots(name)}
    others = sum(p.numel() for p in tuner.model.parameters() if p.requires_grad and id(p) not in added)
    bank, *logits = (sum(slot.tensor.numel() for slot in c.slots(adapter)) for c in reversed(carriers))
    size: float = sum(logits)
    if cfg.save_only_topk_weights:
        size *= (cfg.topk - 1 + cfg.topk * cfg.index_type.itemsize / 4) / cfg.num_vectors
    return int(bank + size), others


def print_savable_parameters(tuner: Any, adapter: str = "default") -> None:
    """Print how many numbers a file of `adapter` holds."""
    own, others = savable_parameters(tuner, adapter)
    print(f"VB-LoRA params to-be-saved (float32-equivalent): {own:,d} || total params to-be-saved: {own + others:,d}")
