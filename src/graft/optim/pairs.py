# SPDX-License-Identifier: Apache-2.0
"""The pairs A and B of LoRA adapters in a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from graft.core.carrier import layer_in
from graft.core.errors import ConfigError


def pairs(model: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter, float]]:
    """Yield A, B and scaling of each LoRA adapter on a layer that is no embedding."""
    for layer in model.modules():
        if layer_in(layer) is layer and "lora_A" in layer.holders and isinstance(layer.lora_A, nn.ModuleDict):
            Bs: Any = layer.lora_B
            for name, A in layer.lora_A.items():
                check_whole(layer, name)
                yield A.weight, Bs[name].weight, layer.scaling[name]  # type: ignore[misc]


def check_whole(layer: Any, adapter: str) -> None:
    """Raise ConfigError if the weights of A and B are not the matrices that they stand for."""
    cfg = layer.methods[adapter].cfg
    for option in ("use_bdlora", "use_qalora"):
        if getattr(cfg, option):
            raise ConfigError(
                f"This optimizer needs A and B as matrices, and of adapter '{adapter}' (layer '{layer.key}') {option} "
                "keeps a part: choose another optimizer, such as LoRA+."
            )


def gram(factor: Tensor, damping: float) -> Tensor:
    """Return (factor factorᵀ + damping · 1)⁺, (r, r), of a matrix (r, n), in float32."""
    if not factor.is_cpu:
        return by_cholesky(factor, damping)
    factor = factor.float()
    return torch.linalg.pinv(factor @ factor.T + damping * torch.eye(len(factor), device=factor.device))


def by_cholesky(factor: Tensor, damping: float) -> Tensor:
    """Return the same where the host would wait for the device, as an SVD needs it.

    It is R = (G + c)⁻¹ with the damping c. Where that is less than what float32 rounds, c is the latter, and with
    E = c R the result R (1 + E) (1 - E²): G⁻¹ up to (c / λ)², and 0 in directions without any of G.
    """
    wide = factor.to(torch.float32 if factor.device.type == "mps" else torch.float64)
    G, eye = wide @ wide.T, torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    least = len(G) * torch.finfo(torch.float32).eps * G.diagonal().amax() + torch.finfo(torch.float32).tiny
    c = least.clamp(min=damping)
    L = torch.linalg.cholesky_ex(G + c * eye)[0]
    inverse = torch.linalg.solve_triangular(L, eye, upper=False)
    R = inverse.T @ inverse
    E = c * R
    return torch.where(least > damping, R @ (eye + E) @ (eye - E @ E), R).float()
