# SPDX-License-Identifier: Apache-2.0
"""The products of a low-rank update.

x (rows, n) is wide, h (rows, r) narrow. Dropout, of the share p, acts on the wide side: on the same elements for the
same seed.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

from graft.kernels.sparse import gathers

BLOCK = 256  # rows in a cast


@lru_cache(maxsize=1)  # several products of one layer ask for the same, one after another
def places(size: int, p: float, seed: int, device: torch.device) -> Tensor:
    """Return where dropout puts zeros: each of `size` places with probability p < 1, the same for the same seed.

    The gaps between zeros are geometric, which takes one random number per zero, not one per place. Do not write to
    the result: it is cached.
    """
    g = torch.Generator(device).manual_seed(seed)
    draws = int(size * p + 6 * math.sqrt(size * p)) + 16  # enough but for one time in 10⁹
    while True:
        gaps = torch.rand(draws, generator=g, device=device).neg_().log1p_().mul_(1 / math.log1p(-p))
        found = gaps.to(torch.int64).add_(1).cumsum(0).sub_(1)
        if found[-1] >= size:
            return found[: int(torch.searchsorted(found, size))]
        draws *= 2


def kept(like: Tensor, p: float, seed: int) -> Tensor:
    """Return a mask of the elements that dropout keeps."""
    if not gathers(like):  # `places` would wait for the device
        g = None if like.is_meta else torch.Generator(like.device).manual_seed(seed)
        return torch.rand(like.shape, generator=g, device=like.device) >= p
    mask = torch.ones(like.shape, dtype=torch.bool, device=like.device)
    mask.view(-1).index_fill_(0, places(like.numel(), p, seed, like.device), False)
    return mask


def dropped(x: Tensor, p: float, seed: int) -> Tensor:
    """Return dropout(x)."""
    return torch.where(kept(x, p, seed), x * (1 / (1 - p)), 0) if p else x


def zeroed(x: Tensor, dtype: torch.dtype, p: float, seed: int) -> Tensor:
    """Return (1 - p) · dropout(x) in `dtype`: the factor is cheaper on the narrow side."""
    if not p:
        return x.to(dtype)
    if not gathers(x):
        return torch.where(kept(x, p, seed), x.to(dtype), 0)
    x = x.to(dtype, copy=True, memory_format=torch.contiguous_format)
    x.view(-1).index_fill_(0, places(x.numel(), p, seed, x.device), 0)
    return x


def down(x: Tensor, W: Tensor, scale: float = 1.0, p: float = 0.0, seed: int = 0) -> Tensor:
    """Return scale · dropout(x) Wᵀ. x (rows, n), W (r, n) → (rows, r), in the dtype of W."""
    if p or x.dtype != W.dtype:
        x, scale = zeroed(x, W.dtype, p, seed), scale / (1 - p)
    h = nn.functional.linear(x, W)
    return h if scale == 1 else h * scale


def up(h: Tensor, W: Tensor, dtype: torch.dtype, p: float = 0.0, seed: int = 0) -> Tensor:
    """Return dropout(h Wᵀ). h (rows, r), W (n, r) → (rows, n), in `dtype`."""
    return zeroed(h * (1 / (1 - p)) @ W.T if p else h @ W.T, h.dtype, p, seed).to(dtype)


def add_up(y: Tensor, h: Tensor, W: Tensor, scale: float, p: float = 0.0, seed: int = 0) -> Tensor:
    """Return y + dropout(scale · h Wᵀ) in y's memory. y (…, n), h (rows, r), W (n, r)."""
    flat = y.view(-1, y.shape[-1])
    if not p and y.dtype == h.dtype:
        flat.addmm_(h, W.T, alpha=scale)
        return y
    dtype = torch.promote_types(y.dtype, h.dtype)
    wide = flat.to(dtype)  # to round the sum once
    h, W, scale = h.to(dtype), W.to(dtype), scale / (1 - p)
    if p and not gathers(y):
        wide.add_(zeroed(h @ W.T, dtype, p, seed), alpha=scale)
    elif p:  # put the elements without an addition back afterwards
        where = places(y.numel(), p, seed, y.device)
        before = wide.view(-1).index_select(0, where)
        wide.addmm_(h, W.T, alpha=scale).view(-1).index_copy_(0, where, before)
    else:
        wide.addmm_(h, W.T, alpha=scale)
    if wide is not flat:
        flat.copy_(wide)
    return y


def outer(h: Tensor, x: Tensor, p: float = 0.0, seed: int = 0) -> Tensor:
    """Return hᵀ dropout(x). h (rows, r), x (rows, n) → (r, n), in the dtype of h."""
    product = h.T @ zeroed(x, h.dtype, p, seed)
    return product * (1 / (1 - p)) if p else product


def outer_wide(x: Tensor, h: Tensor, scale: float) -> Tensor:
    """Return scale · xᵀ h. x (rows, n), h (rows, r) → (n, r), in the dtype of h."""
    return ((h.T @ x.to(h.dtype)) * scale).T  # xᵀ h takes twice as long


def through_up(g: Tensor, W: Tensor, h: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return gradients of h and W through scale · h Wᵀ. g (rows, n), W (n, r), h (rows, r) → (rows, r), (n, r)."""
    if g.dtype == h.dtype or torch.is_grad_enabled():
        return down(g, W.T, scale), outer_wide(g, h, scale)
    dh, dW = torch.empty_like(h), h.new_zeros(W.shape[::-1])
    for part, narrow, out in zip(g.split(BLOCK), h.split(BLOCK), dh.split(BLOCK)):
        wide = part.to(h.dtype)  # small enough to stay in the cache for both
        torch.mm(wide, W, out=out)
        dW.addmm_(narrow.T, wide)
    return dh.mul_(scale), dW.mul_(scale).T
