# SPDX-License-Identifier: Apache-2.0
"""The functions of `kernels/products.py` without their intermediate tensors: casts, masks, sums of full width."""

from __future__ import annotations

import torch
from torch import Tensor

from graft.kernels.triton import launch


def kept(like: Tensor, p: float, seed: int) -> Tensor:
    """Return a mask of the elements that this form's dropout keeps. like (rows, n)."""
    ones = like.new_ones(max(like.shape), 1, dtype=torch.float32)
    return up(ones[: like.shape[0]], ones[: like.shape[1]], torch.float32, p, seed) > 0


def ready(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x  # the kernels cast as they read


def down(x: Tensor, W: Tensor, scale: float = 1.0, p: float = 0.0, seed: int = 0) -> Tensor:
    out = x.new_empty(x.shape[0], W.shape[0], dtype=W.dtype)
    return launch.product(x, W, out, scale, drop="a", p=p, seed=seed)


def up(h: Tensor, W: Tensor, dtype: torch.dtype, p: float = 0.0, seed: int = 0) -> Tensor:
    out = h.new_empty(h.shape[0], W.shape[0], dtype=dtype)
    return launch.product(h, W, out, drop="out", p=p, seed=seed)


def add_up(y: Tensor, h: Tensor, W: Tensor, scale: float, p: float = 0.0, seed: int = 0) -> Tensor:
    launch.product(h, W, y.view(-1, y.shape[-1]), scale, add=True, drop="out", p=p, seed=seed)
    return y


def outer(h: Tensor, x: Tensor, p: float = 0.0, seed: int = 0) -> Tensor:
    return launch.outer(h, x, h.new_empty(h.shape[1], x.shape[1]), p=p, seed=seed)


def outer_wide(x: Tensor, h: Tensor, scale: float) -> Tensor:
    out = h.new_empty(x.shape[1], h.shape[1])
    launch.outer(h, x, out.T, scale)
    return out


def through_up(g: Tensor, W: Tensor, h: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return down(g, W.T, scale), outer_wide(g, h, scale)
