# SPDX-License-Identifier: Apache-2.0
"""Rotation and scaling of pairs of channels: in each group of g, channels j and j + g / 2 are a pair."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graft.kernels.eager import eager
from graft.kernels.function import Function
from graft.kernels.low_rank import FUSED_FROM
from graft.kernels.worth import worth_it


def plain(z: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """The reference: c ⊙ z + s ⊙ z′, z′ with the two of each pair exchanged, computed in the dtype of c.

    z (…, n), c and s (n / g, 2, g / 2). A rotation has s (-sin, sin).
    """
    pairs = z.to(c.dtype).view(*z.shape[:-1], *c.shape)
    return torch.addcmul(pairs * c, pairs.flip(-2), s).flatten(-3).to(z.dtype)


def turn(z: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """Compute `plain`, for many rows without a copy of the halves; keep z as it came."""
    if torch.is_grad_enabled():
        return _Turn.apply(z, c, s) if worth_it(z) else plain(z, c, s)  # type: ignore[no-any-return]
    return _turned(z, c, s) if z.numel() >= FUSED_FROM * z.shape[-1] and eager() else plain(z, c, s)


def _turned(z: Tensor, c: Tensor, s: Tensor) -> Tensor:
    pairs = z.to(c.dtype).view(*z.shape[:-1], *c.shape)
    y = pairs * c
    y[..., 0, :].addcmul_(pairs[..., 1, :], s[:, 0])
    y[..., 1, :].addcmul_(pairs[..., 0, :], s[:, 1])
    return y.flatten(-3).to(z.dtype)


class _Turn(Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, c: Tensor, s: Tensor) -> Tensor:
        ctx.save_for_backward(z, c, s)
        return _turned(z, c, s)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        z, c, s = ctx.saved_tensors
        need_z, need_c, need_s = ctx.needs_input_grad
        pairs, out = (t.to(c.dtype).unflatten(-1, c.shape) for t in (z, g))
        (z1, z2), (g1, g2) = pairs.unbind(-2), out.unbind(-2)
        rows = tuple(range(z.dim() - 1))
        dc = (out * pairs).sum(rows) if need_c else None
        ds = torch.stack(((g1 * z2).sum(rows), (g2 * z1).sum(rows)), 1) if need_s else None
        return _turned(g, c, s.flip(1)) if need_z else None, dc, ds
