# SPDX-License-Identifier: Apache-2.0
"""The matrices diag(l₁) A diag(g₁), diag(l₂) A diag(g₂), …: their rows one by one, all of a row of A together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graft.kernels.eager import eager
from graft.kernels.function import Function


def plain(left: Tensor, A: Tensor, right: Tensor) -> Tensor:
    """The reference. left (r, n), A (r, d), right (n, d) → (r · n, d)."""
    return (left[..., None] * A[:, None] * right).flatten(0, 1)


def between_diagonals(left: Tensor, A: Tensor, right: Tensor) -> Tensor:
    """Compute `plain`; keep nothing but what it gets for the backward pass. A gets no gradient."""
    if not (torch.is_grad_enabled() and eager()):
        return plain(left, A, right)
    return _Between.apply(left, A, right)  # type: ignore[no-any-return]


class _Between(Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, A: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, A, right)
        return plain(left, A, right)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, Tensor]:
        left, A, right = ctx.saved_tensors
        inner = g.view(*left.shape, A.shape[1]) * A[:, None]
        return torch.einsum("rnd,nd->rn", inner, right), None, torch.einsum("rnd,rn->nd", inner, left)
