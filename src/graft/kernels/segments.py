# SPDX-License-Identifier: Apache-2.0
"""A linear layer for rows that use different low-rank adapters, each to the bits of `low_rank_linear` on its own rows.

The layer runs once for all. Adapters of one shape whose tensors lie at equal distances in one memory, as those of a
bank do, share their products; others take turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graft.kernels.eager import Function
from graft.kernels.low_rank import FUSED_FROM, add_up, down, dropped, gradients

LINE = 64  # bytes: products of tensors that begin elsewhere than at a multiple have other bits


def at_line(x: Tensor) -> bool:
    """Return True if x begins at such a multiple."""
    return x.data_ptr() % LINE == 0


def aligned(x: Tensor) -> Tensor:
    """Return x as it would be alone, in memory that begins at a line; its gradient, too."""
    return _Aligned.apply(x) if x.requires_grad and torch.is_grad_enabled() else _aligned(x)  # type: ignore[no-any-return]


def _aligned(x: Tensor) -> Tensor:
    return x if at_line(x) else x.clone()


class _Aligned(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        own = _aligned(x)
        return x.view_as(x) if own is x else own

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return _aligned(g)


class Segment(NamedTuple):
    """Rows that follow each other, and what their adapter adds to them: scale · dropout(x) Aᵀ Bᵀ."""

    rows: int
    A: Tensor | None  # (r, in); None: no adapter
    B: Tensor | None  # (out, r)
    scale: float = 1.0
    p: float = 0.0
    seed: int = 0


class Group(NamedTuple):
    """Segments that share their products."""

    start: int  # the first of their rows
    stop: int
    first: int  # the first of their segments
    width: int  # how many they are
    A: Tensor  # (r, in), or (count, r, in)
    B: Tensor  # (out, r), or (count, out, r)
    scale: float
    p: float
    seed: int

    @property
    def few(self) -> bool:
        """Return True if each has so few rows that alone it runs without an autograd.Function."""
        return self.stop - self.start < FUSED_FROM * self.width


def plain(y: Tensor, x: Tensor, segments: Sequence[Segment]) -> Tensor:
    """The reference, from y = base(x). y (rows, out), x (rows, in)."""
    parts, sizes = [], [s.rows for s in segments]
    for own, part, (_, A, B, scale, p, seed) in zip(y.split(sizes), x.split(sizes), segments):
        if A is not None and B is not None:
            own = (own + (dropped(part, p, seed).to(A.dtype) @ A.T @ B.T) * scale).to(own.dtype)
        parts.append(own)
    return torch.cat(parts)


def linear(
    base: Callable[[Tensor], Tensor],
    input_gradient: Callable[[Tensor, Tensor], Tensor],
    W: Tensor,
    x: Tensor,
    segments: Sequence[Segment],
) -> Tensor:
    """Return base(x) with what the adapters add to their rows. W gets no gradient.

    Args:
        base, input_gradient, W: as in `low_rank_linear`.
        x: (…, in), whose rows, counted over all dimensions but the last, are those of the segments in their order.
    """
    factors = [t for s in segments for t in (s.A, s.B)]
    return _Linear.apply(x, W, base, input_gradient, segments, *factors)  # type: ignore[no-any-return]


def groups_of(segments: Sequence[Segment]) -> list[Group]:
    """Return the segments with an adapter, those side by side together that can share products."""
    found, start, i = [], 0, 0
    while i < len(segments):
        s, count = segments[i], 1
        if s.A is not None and s.B is not None:
            while not s.p and i + count < len(segments) and _alike(s, segments[i + count]):
                count += 1
            A = B = None
            if count > 1:
                alike = segments[i : i + count]
                A, B = spread([t.A for t in alike]), spread([t.B for t in alike])  # type: ignore[misc]
            if A is None or B is None:
                A, B, count = s.A, s.B, 1
            found.append(Group(start, start + count * s.rows, i, count, A, B, s.scale, s.p, s.seed))
        start, i = start + count * s.rows, i + count
    return found


def _alike(a: Segment, b: Segment) -> bool:
    return (
        b.A is not None
        and b.B is not None
        and (a.rows, a.scale, a.p) == (b.rows, b.scale, b.p)
        and a.A.shape == b.A.shape  # type: ignore[union-attr]
        and a.A.dtype == b.A.dtype  # type: ignore[union-attr]
    )


def spread(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return tensors of one shape (…) that lie at equal distances in one memory as a view (n, …) of it; else None."""
    first, second = tensors[0], tensors[1]
    start, size = first.data_ptr(), first.element_size()
    step = second.data_ptr() - start
    if step <= 0 or step % size or first.untyped_storage().data_ptr() != tensors[-1].untyped_storage().data_ptr():
        return None
    if any(t.data_ptr() - start != i * step or t.stride() != first.stride() for i, t in enumerate(tensors)):
        return None
    shape, strides = (len(tensors), *first.shape), (step // size, *first.stride())
    return first.detach().as_strided(shape, strides, first.storage_offset())


class _Linear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, base: Any, input_gradient: Any, segments: Sequence[Segment], *factors: Any
    ) -> Tensor:
        y = base(x)
        groups, narrow = groups_of(segments), []
        flat, out = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        for group in groups:
            narrow.append(_add(out[group.start : group.stop], flat[group.start : group.stop], group))
        ctx.save_for_backward(x, W, *narrow, *factors)
        ctx.groups, ctx.segments, ctx.base, ctx.input_gradient = groups, segments, base, input_gradient
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, W, *saved = ctx.saved_tensors
        need_x, need = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        rows = g.reshape(-1, g.shape[-1])
        if torch.is_grad_enabled():  # for a second derivative
            return _again(ctx, x, W, saved[len(ctx.groups) :], rows)
        flat, grads = x.reshape(-1, x.shape[-1]), [None] * len(need)
        dx = ctx.input_gradient(rows, W.to(g.dtype)) if need_x else None
        for group, h in zip(ctx.groups, saved):
            here = slice(group.start, group.stop)
            places = slice(2 * group.first, 2 * (group.first + group.width))
            grads[places] = _gradients(rows[here], flat[here], h, group, None if dx is None else dx[here], need[places])
        return None if dx is None else dx.to(x.dtype).view(x.shape), None, None, None, None, *grads


def _add(y: Tensor, x: Tensor, group: Group) -> Tensor:
    """Add what the adapters of a group add to their rows to y, in its memory; return h = x Aᵀ. y (rows, out)."""
    A, B, n = group.A, group.B, group.width
    if n > 1:
        y, x = y.view(n, -1, y.shape[-1]), x.view(n, -1, x.shape[-1])
        h = torch.bmm(x, A.mT)
        if group.few:
            y.add_(torch.bmm(h, B.mT), alpha=group.scale)
        else:
            y.baddbmm_(h, B.mT, alpha=group.scale)
        return h
    if group.few and y.dtype == A.dtype == x.dtype:
        h = nn.functional.linear(x, A)
        y.add_(nn.functional.linear(h, B), alpha=group.scale)
        return h
    h = down(x, A, 1.0, group.p, group.seed)
    add_up(y, h, B, group.scale)
    return h


def _gradients(g: Tensor, x: Tensor, h: Tensor, group: Group, dx: Tensor | None, need: Sequence[bool]) -> list[Any]:
    """Return the gradients of A and B of each segment of a group, and add that of x to dx, in its memory."""
    A, B, n, scale = group.A, group.B, group.width, group.scale
    if not group.few and n == 1:
        _, dA, dB = gradients(g, x, A, B, h, scale, group.p, group.seed, need=(dx is not None, need[0], need[1]), dx=dx)
        return [dA, dB]
    if n > 1:
        g, x = g.view(n, -1, g.shape[-1]), x.view(n, -1, x.shape[-1])
        dx = None if dx is None else dx.view(n, -1, dx.shape[-1])
    if group.few:
        g = g if scale == 1 else g * scale
        dh, dB = g @ B, g.mT @ h
        if dx is not None:
            dx += dh @ A
    else:
        dh = g @ B
        dh = dh if scale == 1 else dh * scale
        dB = ((h.mT @ g) * scale).mT
        if dx is not None:
            dx.baddbmm_(dh, A)
    dA = dh.mT @ x
    if n == 1:
        return [dA, dB]
    return [t for pair in zip(dA.unbind(), dB.unbind()) for t in pair]


def _again(ctx: Any, x: Tensor, W: Tensor, factors: Sequence[Any], g: Tensor) -> tuple[Any, ...]:
    """Return gradients that have gradients: those of the plain products."""
    given = iter(factors)
    segments = [s._replace(A=next(given), B=next(given)) for s in ctx.segments]
    y = ctx.base(x)
    y = plain(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), segments)
    inputs = (x, None, None, None, None, *factors)
    wanted = [i for i, need in enumerate(ctx.needs_input_grad) if need]
    found = torch.autograd.grad(y, [inputs[i] for i in wanted], g.view_as(y), create_graph=True)
    grads: list[Any] = [None] * len(inputs)
    for i, grad in zip(wanted, found):
        grads[i] = grad
    return tuple(grads)
