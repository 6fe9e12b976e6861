# SPDX-License-Identifier: Apache-2.0
"""The pairs A and B of LoRA adapters in a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from graft.core.carrier import layer_in


def pairs(model: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter, float]]:
    """Yield A, B and scaling of each LoRA adapter on a layer that is no embedding."""
    for layer in model.modules():
        if layer_in(layer) is layer and "lora_A" in layer.holders and isinstance(layer.lora_A, nn.ModuleDict):
            Bs: Any = layer.lora_B
            for name, A in layer.lora_A.items():
                yield A.weight, Bs[name].weight, layer.scaling[name]  # type: ignore[misc]


def gram(factor: Tensor, damping: float) -> Tensor:
    """Return (factor factorᵀ + damping · 1)⁺, (r, r), of a matrix (r, n), in float32."""
    factor = factor.float()
    return torch.linalg.pinv(factor @ factor.T + damping * torch.eye(len(factor), device=factor.device))
