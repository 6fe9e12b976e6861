# SPDX-License-Identifier: Apache-2.0
"""LoRA+: B learns faster than A."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

EIGHT_BIT = ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")  # of bitsandbytes


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """Make an optimizer for LoRA+ (arXiv 2402.12354): B learns `loraplus_lr_ratio` times as fast as A.

    One-dimensional parameters learn with B, all others with A; biases and layer norms do not decay. An 8-bit Adam of
    bitsandbytes keeps the state of embeddings that train in 32 bits.

    Args:
        loraplus_weight_decay: decay of all others (0).
        loraplus_lr_embedding: learning rate of adapters on embeddings (1e-6).
        kwargs: arguments of the optimizer.
    """
    decay, lr_embedding = kwargs.pop("loraplus_weight_decay", 0.0), kwargs.pop("loraplus_lr_embedding", 1e-6)
    norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters(recurse=False)}
    groups: dict[str, list[nn.Parameter]] = {"A": [], "embedding": [], "B": [], "B without decay": []}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if "lora_embedding_" in name:
            groups["embedding"].append(p)
        elif "lora_B" not in name and p.ndim > 1:
            groups["A"].append(p)
        else:
            groups["B without decay" if "bias" in name or id(p) in norms else "B"].append(p)
    fast = lr * loraplus_lr_ratio
    rates = {"A": (lr, decay), "embedding": (lr_embedding, decay), "B": (fast, decay), "B without decay": (fast, 0.0)}
    made = [{"params": groups[k], "lr": rate, "weight_decay": wd} for k, (rate, wd) in rates.items()]
    optimizer = optimizer_cls(made, **kwargs)  # type: ignore[arg-type]
    if optimizer_cls.__name__ in EIGHT_BIT:
        keep_embeddings_wide(model)
    return optimizer


def keep_embeddings_wide(model: nn.Module) -> None:
    """Have bitsandbytes hold the state of embeddings in 32 bits: of most tokens a step sees nothing, of some much."""
    from bitsandbytes.optim import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
