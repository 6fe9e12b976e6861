# SPDX-License-Identifier: Apache-2.0
"""The sum y + s · dropout(x) Aᵀ Bᵀ in y's own memory; it keeps little for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graft.kernels import products
from graft.kernels.eager import autocast_dtype, eager
from graft.kernels.function import Function
from graft.kernels.products import dropped

FUSED_FROM = 64  # rows: with fewer, an autograd.Function costs more than it saves


def plain(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, p: float = 0.0) -> Tensor:
    """The reference. y (…, out), x (…, in), A (r, in), B (out, r); computes in the dtype of A."""
    x = nn.functional.dropout(x.to(A.dtype), p) if p else x.to(A.dtype)
    return (y + (x @ A.T @ B.T) * scale).to(y.dtype)


def add_low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, p: float = 0.0) -> Tensor:
    """Compute `plain`; y's memory holds the result.

    y must be fresh: nothing else may need its values, not even its own backward pass (a linear layer's does not).
    """
    if not p and not torch.is_grad_enabled():
        A, B = autocast(x, A, B)
        return products.add_up(y, products.down(x.reshape(-1, x.shape[-1]), A), B, scale)
    if fuses(x, p):
        A, B = autocast(x, A, B)
        return _AddLowRank.apply(y, x, A, B, scale, p, seed_for(p))  # type: ignore[no-any-return]
    return plain(y, x, A, B, scale, p)


def add_product(y: Tensor, h: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return y + s · h Bᵀ. y (…, out), h (…, r), B (out, r).

    y must be fresh, as for `add_low_rank`: its memory may hold the result.
    """
    (B,) = autocast(h, B)
    h = h.to(B.dtype)
    if not fuses(h, 0.0):
        return (y + h @ B.T * scale).to(y.dtype)
    return _AddProduct.apply(y, h, B, scale)  # type: ignore[no-any-return]


def low_rank_linear(
    base: Callable[[Tensor], Tensor],
    input_gradient: Callable[[Tensor, Tensor], Tensor],
    W: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    p: float = 0.0,
) -> Tensor:
    """Call `add_low_rank` on base(x), with one gradient of x for both. W gets no gradient.

    Args:
        base: a linear layer without hooks.
        input_gradient: (gradient of its output (rows, out), W) → gradient of its input (rows, in).
        W: its weight, as `input_gradient` takes it.
    """
    if not fuses(x, p) or not torch.is_grad_enabled():
        return add_low_rank(base(x), x, A, B, scale, p)
    A, B = autocast(x, A, B)
    return _LowRankLinear.apply(x, W, A, B, base, input_gradient, scale, p, seed_for(p))  # type: ignore[no-any-return]


def fuses(x: Tensor, p: float) -> bool:
    """Say whether an autograd.Function pays. x (…, in).

    With dropout it does also without gradients: reentrant checkpointing runs first without, then with them, and both
    runs need one mask.
    """
    return (torch.is_grad_enabled() or p > 0) and x.numel() >= FUSED_FROM * x.shape[-1]


def autocast(x: Tensor, *factors: Tensor) -> Sequence[Tensor]:
    """Return `factors` in the dtype of autocast if it is on, else as they are."""
    dtype = autocast_dtype(x.device)
    return factors if dtype is None else [f.to(dtype) for f in factors]


def new_seed() -> int:
    return int(torch.randint(2**62, (), device="cpu").item())


def seed_for(p: float) -> int:
    return new_seed() if p else 0


def dropout(x: Tensor, p: float) -> Tensor:
    """Do torch's dropout; for many rows keep a seed for the backward pass instead of a mask."""
    if not eager() or x.numel() < FUSED_FROM * x.shape[-1]:
        return nn.functional.dropout(x, p)
    return _Dropout.apply(x, p, new_seed())  # type: ignore[no-any-return]


class _Dropout(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int) -> Tensor:
        ctx.options = p, seed
        return dropped(x, p, seed)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return dropped(g, *ctx.options), None, None


class _AddLowRank(Function):
    """`add_low_rank`, which keeps x as it came (others often keep it anyway) and h = x Aᵀ, r numbers per row."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, p: float, seed: int) -> Tensor:
        h = products.down(x.reshape(-1, x.shape[-1]), A, 1.0, p, seed)
        ctx.save_for_backward(x, A, B, h)
        ctx.options = scale, p, seed
        return products.add_up(y.data, h, B, scale)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        rows = g.reshape(-1, g.shape[-1])
        return (
            g,
            *gradients(rows, *ctx.saved_tensors, *ctx.options, need=ctx.needs_input_grad[1:4]),
            None,
            None,
            None,
        )


class _AddProduct(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, B: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(h if ctx.needs_input_grad[2] else None, B)
        ctx.options = h.shape, scale
        return products.add_up(y.data, h.reshape(-1, h.shape[-1]), B, scale)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        (h, B), (shape, scale) = ctx.saved_tensors, ctx.options
        rows, dB = g.reshape(-1, g.shape[-1]), None
        if h is None:  # B is fixed
            dh = products.down(rows, B.T, scale)
        else:
            dh, dB = products.through_up(rows, B, h.reshape(-1, shape[-1]), scale)
        return g, dh.view(shape), dB, None


class _LowRankLinear(Function):
    """`low_rank_linear`: the same together with the base layer, to whose gradient of x it adds its own."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, A: Tensor, B: Tensor, base: Any, input_gradient: Any, scale: float, p: float,
        seed: int,
    ) -> Tensor:  # fmt: skip
        y = base(x)
        h = products.down(x.reshape(-1, x.shape[-1]), A, 1.0, p, seed)
        ctx.save_for_backward(W, x, A, B, h)
        ctx.input_gradient, ctx.options = input_gradient, (scale, p, seed)
        return products.add_up(y, h, B, scale)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        W, *saved = ctx.saved_tensors
        need_x, _, *need = ctx.needs_input_grad[:4]
        rows = g.reshape(-1, g.shape[-1])
        dx = ctx.input_gradient(rows, W.to(g.dtype)) if need_x else None
        dx, dA, dB = gradients(rows, *saved, *ctx.options, need=(need_x, *need), dx=dx)
        return dx, None, dA, dB, None, None, None, None, None


def gradients(
    g: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    h: Tensor,
    scale: float,
    p: float,
    seed: int,
    *,
    need: Sequence[bool],
    dx: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, A and B, as far as there is need, from that of the output, g (rows, out).

    dx: a gradient of x (rows, in) that takes in the other, in place.
    """
    need_x, need_A, need_B = need
    drop: dict[str, Any] = dict(p=p, seed=seed)
    flat = x.reshape(-1, x.shape[-1])
    again = torch.is_grad_enabled()
    if again:  # for a second derivative: h by operations that have one
        h = products.down(flat, A, **drop)
    dh, dB = products.through_up(g, B, h, scale)
    dA = products.outer(dh, flat, **drop) if need_A else None
    if need_x and dx is not None and not again:
        dx = products.add_up(dx, dh, A.T, 1.0, p, seed)
    elif need_x:
        own = products.up(dh, A.T, x.dtype, **drop)
        dx = own if dx is None else dx + own
    return None if dx is None else dx.to(x.dtype).view(x.shape), dA, dB if need_B else None
