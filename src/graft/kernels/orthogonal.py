# SPDX-License-Identifier: Apache-2.0
"""Orthogonal matrices from free parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def skew(v: Tensor, size: int) -> Tensor:
    """(blocks, size, size) skew-symmetric, from strict upper triangles row by row."""
    rows, cols = torch.triu_indices(size, size, 1, device=v.device)
    Q = v.new_zeros(v.shape[0], size, size).index_put(
        (torch.arange(v.shape[0], device=v.device)[:, None], rows, cols), v
    )
    return Q - Q.mT


def constrain(v: Tensor, eps: float) -> Tensor:
    """Scale each block so that its Frobenius norm is at most eps / √blocks."""
    limit = eps / math.sqrt(v.shape[0])
    norm = v.norm(dim=1, keepdim=True) * math.sqrt(2)  # of Q, which holds every entry twice
    return v * (limit / norm).clamp(max=1)


def cayley(Q: Tensor, terms: int | None) -> Tensor:
    """(I - Q)(I + Q)⁻¹; or the truncated series of its inverse, I + 2Q + 2Q² + … + Qⁿ⁻¹ (as PEFT has it)."""
    I = torch.eye(Q.shape[-1], device=Q.device, dtype=Q.dtype)
    if terms is None:
        return torch.linalg.solve(I + Q, I - Q, left=False)
    if terms == 1:
        return I.expand_as(Q)
    if terms == 2:
        return I + 2 * Q
    R, power = I + 2 * Q, Q
    for _ in range(2, max(terms, 4) - 1):
        power = power @ Q
        R = R + 2 * power
    return R + power @ Q


def gram_distance(P: Tensor) -> Tensor:
    """‖P Pᵀ - I‖_F: how far the rows of P are from orthonormal."""
    return torch.linalg.norm(P @ P.T - torch.eye(len(P), device=P.device, dtype=P.dtype))
