# SPDX-License-Identifier: Apache-2.0
"""y + s · dropout(x) Aᵀ Bᵀ, added into y's own memory, with little kept for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

FUSED_FROM = 64  # rows: with fewer, an autograd.Function costs more than it saves


def eager() -> bool:
    """Whether operations run as they are written: no compiler to fuse them, no functional transform."""
    return not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def unhooked(module: nn.Module) -> bool:
    """Whether calling a linear layer does nothing but its forward, so that its weight can be used without the call."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def plain(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, p: float = 0.0) -> Tensor:
    """The reference. y (…, out), x (…, in), A (r, in), B (out, r); computes in the dtype of A."""
    x = nn.functional.dropout(x.to(A.dtype), p)
    return (y + (x @ A.T @ B.T) * scale).to(y.dtype)


def add_low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, p: float = 0.0) -> Tensor:
    """As `plain`; y's memory holds the result.

    y must be fresh: nothing else may need its values, not even its own backward pass (a linear layer's does not).
    """
    # with dropout also without gradients: reentrant checkpointing runs first without, then with them, for one mask
    if (torch.is_grad_enabled() or p) and x.numel() >= FUSED_FROM * x.shape[-1]:
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            A, B = A.to(dtype), B.to(dtype)
        seed = new_seed() if p else 0
        return _AddLowRank.apply(y, x, A, B, scale, p, seed)  # type: ignore[no-any-return]
    if p:
        return plain(y, x, A, B, scale, p)
    if not torch.is_grad_enabled():
        return _add(y, x.to(A.dtype).reshape(-1, x.shape[-1]) @ A.T, B, scale)
    return (y + (x.to(A.dtype) @ A.T @ B.T) * scale).to(y.dtype)


def _add(y: Tensor, h: Tensor, B: Tensor, scale: float) -> Tensor:
    """y + scale · h Bᵀ in y's memory. h (rows, r)."""
    flat = y.view(-1, y.shape[-1])
    if y.dtype == h.dtype:
        flat.addmm_(h, B.T, alpha=scale)
    else:
        flat.add_(h @ B.T, alpha=scale)  # rounds once
    return y


def new_seed() -> int:
    return int(torch.randint(2**62, ()).item())


def kept(like: Tensor, p: float, seed: int) -> Tensor:
    """Which elements dropout keeps: a comparison of 16 random bits each, the same for the same seed."""
    g = torch.Generator(like.device).manual_seed(seed)
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    words.random_(-(2**63), None, generator=g)
    bits = words.view(torch.int16)[: like.numel()].view(like.shape)
    return bits >= round(p * 2**16) - 2**15


def dropped(x: Tensor, p: float, seed: int) -> Tensor:
    return torch.where(kept(x, p, seed), x * (1 / (1 - p)), 0) if p else x


def dropout(x: Tensor, p: float) -> Tensor:
    """torch's dropout, which for many rows keeps a seed for the backward pass instead of a mask."""
    if not eager() or x.numel() < FUSED_FROM * x.shape[-1]:
        return nn.functional.dropout(x, p)
    return _Dropout.apply(x, p, new_seed())  # type: ignore[no-any-return]


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int) -> Tensor:
        ctx.options = p, seed
        return dropped(x, p, seed)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return dropped(g, *ctx.options), None, None


class _AddLowRank(torch.autograd.Function):
    """Keeps x as it came (its memory is often kept anyway), and h = x Aᵀ of r numbers per row."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, p: float, seed: int) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(A.dtype)
        h = dropped(flat, p, seed) @ A.T
        ctx.save_for_backward(x, A, B, h)
        ctx.options = scale, p, seed
        return _add(y.data, h, B, scale)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, A, B, h = ctx.saved_tensors
        scale, p, seed = ctx.options
        need_x, need_A, need_B = ctx.needs_input_grad[1:4]
        flat = dropped(x.reshape(-1, x.shape[-1]).to(A.dtype), p, seed) if need_A or torch.is_grad_enabled() else None
        if torch.is_grad_enabled():  # for a second derivative: h as a function of x and A
            h = flat @ A.T  # type: ignore[operator]
        rows = g.reshape(-1, g.shape[-1]).to(A.dtype)
        dh = (rows @ B) * scale if need_x or need_A else None
        dA = dh.T @ flat if need_A else None  # type: ignore[union-attr,operator]
        dB = (rows.T @ h) * scale if need_B else None
        dx = dropped(dh @ A, p, seed).to(x.dtype).view(x.shape) if need_x else None  # type: ignore[operator]
        return g, dx, dA, dB, None, None, None
