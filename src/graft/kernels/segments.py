# SPDX-License-Identifier: Apache-2.0
"""A linear layer for rows of different low-rank adapters, each with the bits of `low_rank_linear` on its rows alone.

The base layer runs once for all rows. Adapters of one shape with stacked tensors share their products; others run one
after another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from graft.kernels.eager import Context, Function, differentiate
from graft.kernels.low_rank import FUSED_FROM, add_up, down, down_each, dropped, gradients

NARROW, SMALL = 2, 400  # vectors, and multiplications: smaller products run other kernels alone than in a batch
LINE = 64  # bytes: products of tensors that do not begin at a multiple have other bits


def is_at_line(x: Tensor) -> bool:
    """Return True if the memory of x begins at a multiple of `LINE` bytes."""
    return x.data_ptr() % LINE == 0


def align(x: Tensor) -> Tensor:
    """Return x, or a copy if its memory does not begin at a multiple of `LINE` bytes; its gradient likewise.

    So a product of a slice has the bits of the same product alone. Where x trains, the result is a view or a copy.
    """
    return _Align.apply(x) if x.requires_grad and torch.is_grad_enabled() else _align_memory(x)


def _align_memory(x: Tensor) -> Tensor:
    """Return x if its memory begins at a multiple of `LINE` bytes, else a clone."""
    return x if is_at_line(x) else x.clone()


class _Align(Function):
    """The function of `align`."""

    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        """Return a view of x if it is aligned, else a clone."""
        copy = _align_memory(x)
        return x.view_as(x) if copy is x else copy

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> Tensor:
        """Return the gradient if it is aligned, else a clone."""
        return _align_memory(g)


class Segment(NamedTuple):
    """Consecutive rows and the update of their adapter: scale · dropout(x) Aᵀ Bᵀ."""

    rows: int
    A: Tensor | None  # (r, in); None: no adapter
    B: Tensor | None  # (out, r)
    scale: float = 1.0
    p: float = 0.0
    seed: int = 0


class GradientSink(Protocol):
    """The memory that receives the gradient of one factor in a backward pass, in place of its `grad`."""

    def claim(self) -> Tensor | None:
        """Return the memory for the first gradient of the pass, for an operation to write to; None for a later one. A
        protocol, without a body.
        """

    def add(self, gradient: Tensor) -> None:
        """Add a later gradient of the pass to the memory. A protocol, without a body."""


class Stacks(Protocol):
    """Tensors of adapters that lie at equal distances in one memory."""

    def follows(self, a: Tensor, b: Tensor) -> bool:
        """Return True if tensor b comes next after tensor a in their common memory. A protocol, without a body."""

    def stack(self, first: Tensor, n: int) -> Tensor:
        """Return `first` and the n - 1 tensors after it as one leaf (n, …) that passes its gradient on to them.

        A protocol, without a body.
        """

    def sink(self, t: Tensor) -> GradientSink | None:
        """Return the memory for the gradient of a stacked or single tensor; None if its `grad` has to receive it. A
        protocol, without a body.
        """


Two = tuple[Tensor | None, Tensor | None]


class Group(NamedTuple):
    """Consecutive segments that share their products."""

    start: int  # the first of their rows
    stop: int
    width: int  # the number of segments
    A: Tensor  # (r, in), or (width, r, in)
    B: Tensor  # (out, r), or (width, out, r)
    scale: float
    p: float
    seed: int
    sinks: tuple[GradientSink, GradientSink] | None = None  # of A and B; None: autograd gets their gradients

    @property
    def is_small(self) -> bool:
        """True if each segment has fewer than `FUSED_FROM` rows, so that alone it runs without an autograd.Function."""
        return self.stop - self.start < FUSED_FROM * self.width

    def rows_of(self, x: Tensor) -> Tensor:
        """Return the group's rows of x (rows, n) as a view; x itself if these are all."""
        return x if self.stop - self.start == len(x) else x[self.start : self.stop]

    def claim_sinks(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the memory for the gradients of A and B; None where autograd gets it, or it has to be added."""
        return (None, None) if self.sinks is None else (self.sinks[0].claim(), self.sinks[1].claim())

    def deliver(self, dA: Tensor, dB: Tensor, into: tuple[Tensor | None, Tensor | None]) -> Two:
        """Return the gradients of A and B for autograd, or (None, None) if the sinks have them.

        into: the memory that `claim_sinks` returned. A gradient that is not there is copied there; one without memory
        is added to those of earlier uses.
        """
        if self.sinks is None:
            return dA, dB
        if into[0] is dA and into[1] is dB:
            return None, None
        for gradient, memory, sink in zip((dA, dB), into, self.sinks):
            if memory is None:
                sink.add(gradient)
            elif memory is not gradient:
                memory.copy_(gradient)
        return None, None


def plain_segments_linear(y: Tensor, x: Tensor, groups: Sequence[Group]) -> Tensor:
    """Return y = base(x) with each group's updates added to its rows, (rows, out), in new memory, by plain operations;
    the reference. Dropout drops by the group's seed; sums are cast to y's dtype.

    y (rows, out), x (rows, in). Rows of no group stay. A group of several adapters splits its rows evenly among them.
    """
    parts, end = [], 0
    for start, stop, n, A, B, scale, p, seed, _ in groups:
        group_rows, part, (A, B) = y[start:stop], x[start:stop], (A, B) if n > 1 else (A[None], B[None])
        parts.append(y[end:start])
        for into, piece, a, b in zip(group_rows.chunk(n), part.chunk(n), A, B):
            parts.append((into + (dropped(piece, p, seed).to(a.dtype) @ a.T @ b.T) * scale).to(y.dtype))
        end = stop
    return torch.cat([*parts, y[end:]])


def segments_linear(
    base: Callable[[Tensor], Tensor],
    input_gradient: Callable[[Tensor, Tensor], Tensor],
    W: Tensor,
    x: Tensor,
    groups: Sequence[Group],
) -> Tensor:
    """Return base(x) with the updates of the adapters added to their rows, in the memory of base(x).

    W gets no gradient.

    Args:
        base: a linear layer without hooks.
        input_gradient: (gradient of its output (rows, out), W) → gradient of its input (rows, in).
        W: its weight, as `input_gradient` takes it.
        x: (…, in). `group_segments` has counted its rows over all dimensions but the last.
    """
    factors = [t for g in groups for t in (g.A, g.B)]
    return _SegmentsLinear.apply_eagerly(x, W, base, input_gradient, groups, *factors)


def group_segments(segments: Sequence[Segment], stacks: Stacks | None, dtype: torch.dtype) -> list[Group]:
    """Return the segments with an adapter as groups: neighbours with stacked factors become one, others stay alone.

    Segments without an adapter give no group; they only move the row at which the next begins. A group keeps the scale,
    rate and seed of its first segment, and the gradient sinks of its factors. Without `stacks` nothing is shared, and
    there are no sinks.

    dtype: of the rows. Factors of another dtype are not shared, and get no sinks.
    """
    groups, start, i = [], 0, 0
    while i < len(segments):
        (rows, A, B, scale, p, seed), count = segments[i], 1
        if A is not None and B is not None:
            share = stacks if A.dtype == B.dtype == dtype else None
            while (
                share and i + count < len(segments) and _can_share(segments[i + count - 1], segments[i + count], share)
            ):
                count += 1
            if share and count > 1:
                A, B = share.stack(A, count), share.stack(B, count)
            groups.append(Group(start, start + count * rows, count, A, B, scale, p, seed, _find_sinks(share, A, B)))
        start, i = start + count * rows, i + count
    return groups


def _find_sinks(stacks: Stacks | None, A: Tensor, B: Tensor) -> tuple[GradientSink, GradientSink] | None:
    """Return the sinks of both factors; None without `stacks`, or if one of the factors has none."""
    if stacks is None or (a := stacks.sink(A)) is None or (b := stacks.sink(B)) is None:
        return None
    return a, b


def _can_share(a: Segment, b: Segment, stacks: Stacks) -> bool:
    """Return True if two neighbouring segments may share products, so that their results have the bits of single ones.

    Both need an adapter without dropout, equal rows and scales, and factors of b that follow those of a in one memory.
    The products must be large enough: at least `NARROW` (2) rows and rank, and at least `SMALL` (400) for rows · r ·
    the smaller of in and out.
    """
    if a.A is None or a.B is None or b.A is None or b.B is None or a.p or b.p or (a.rows, a.scale) != (b.rows, b.scale):
        return False
    (r, n), m = a.A.shape, len(a.B)
    if min(r, a.rows) < NARROW or a.rows * r * min(n, m) < SMALL:
        return False
    return stacks.follows(a.A, b.A) and stacks.follows(a.B, b.B)


class _SegmentsLinear(Function):
    """The function of `segments_linear`."""

    @staticmethod
    def forward(
        ctx: Context,
        x: Tensor,
        W: Tensor,
        base: Callable[[Tensor], Tensor],
        input_gradient: object,
        groups: Sequence[Group],
        *factors: Tensor,
    ) -> Tensor:
        """Return base(x), with the update of each group added to its rows in place.

        Keeps x, W, the factors, each h = x Aᵀ, and the groups, `base` and `input_gradient`.

        factors: A and B of each group.
        """
        y, narrow = base(x), []
        flat, out = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        for group in groups:
            narrow.append(
                (_add_stacked if group.width > 1 else _add_group)(group.rows_of(out), group.rows_of(flat), group)
            )
        ctx.save_for_backward(x, W, *narrow, *factors)
        ctx.groups, ctx.base, ctx.input_gradient = groups, base, input_gradient
        return y

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of the groups' A and B, each None without need, and None for the others.

        The gradient of x is that of the base layer, by W cast to the dtype of g. Each group adds its share in place,
        and the sum is cast to x's dtype. Groups of few rows, or of several adapters, compute both factors' gradients
        always. For a second derivative autograd runs through `plain_segments_linear` instead.
        """
        x, W, *saved = ctx.saved_tensors
        need_x, need = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
        rows = g.reshape(-1, g.shape[-1])
        if torch.is_grad_enabled():  # for a second derivative
            return _differentiable_gradients(ctx, x, W, saved[len(ctx.groups) :], rows)
        flat, grads = x.reshape(-1, x.shape[-1]), list[Tensor | None]()
        dx = ctx.input_gradient(rows, W.to(g.dtype)) if need_x else None
        for i, (group, h) in enumerate(zip(ctx.groups, saved)):
            into, run = None if dx is None else group.rows_of(dx), _gradients_stacked if group.width > 1 else _gradients
            grads += run(group.rows_of(rows), group.rows_of(flat), h, group, into, need[2 * i : 2 * i + 2])
        return None if dx is None else dx.to(x.dtype).view(x.shape), None, None, None, None, *grads


def _add_group(y: Tensor, x: Tensor, group: Group) -> Tensor:
    """Add an adapter's update to its rows y (rows, out), in y's memory. Return h = dropout(x) Aᵀ, (rows, r).

    A small group with one dtype of y, x and A uses the operations of a small batch alone, so that the bits agree, and
    no dropout.
    """
    A, B = group.A, group.B
    if group.is_small and y.dtype == A.dtype == x.dtype:
        h = nn.functional.linear(x, A)
        y.add_(nn.functional.linear(h, B), alpha=group.scale)
        return h
    h = down(x, A, 1.0, group.p, group.seed)
    add_up(y, h, B, group.scale)
    return h


def _add_stacked(y: Tensor, x: Tensor, group: Group) -> Tensor:
    """Add scale · x Aᵀ Bᵀ of several adapters to their rows of y, in its memory, by batched products.

    Return h = x Aᵀ (width, rows of each, r). Small groups use the operations of small batches alone.
    """
    B, n = group.B.mT, group.width
    y, h = y.view(n, -1, y.shape[-1]), down_each(x.view(n, -1, x.shape[-1]), group.A)
    if group.is_small:
        y.add_(torch.bmm(h, B), alpha=group.scale)
    else:
        y.baddbmm_(h, B, alpha=group.scale)
    return h


def _gradients(g: Tensor, x: Tensor, h: Tensor, group: Group, dx: Tensor | None, need: Sequence[bool]) -> Two:
    """Return the gradients of A and B of an adapter from g (rows, out); None for those that a sink gets.

    In a group of many rows each is None without need, and sinks get both or none. In a small group both are computed
    always, and the products overwrite the sinks' memory. Adds the gradient of x to dx in its memory, unless dx is None.
    """
    A, B, scale, into = group.A, group.B, group.scale, group.claim_sinks()
    if not group.is_small:
        _, dA, dB = gradients(g, x, A, B, h, scale, group.p, group.seed, need=(dx is not None, need[0], need[1]), dx=dx)
        return (dA, dB) if dA is None or dB is None else group.deliver(dA, dB, into)
    g = g if scale == 1 else g * scale
    dh, dB = g @ B, torch.mm(g.mT, h, out=into[1])
    if dx is not None:
        dx += dh @ A
    return group.deliver(torch.mm(dh.mT, x, out=into[0]), dB, into)


def _gradients_stacked(g: Tensor, x: Tensor, h: Tensor, group: Group, dx: Tensor | None, need: Sequence[bool]) -> Two:
    """Return the gradients of A (width, r, in) and B (width, out, r) of several adapters, always both, by batched
    products; None for those that a sink gets.

    A sink's memory is overwritten by the product, except that of B in a large group, which gets a copy. Adds the
    gradient of x to dx in its memory, unless dx is None. Small groups use the operations of small batches alone, so
    that the bits agree.
    """
    A, B, n, scale, into = group.A, group.B, group.width, group.scale, group.claim_sinks()
    g, x = g.view(n, -1, g.shape[-1]), x.view(n, -1, x.shape[-1])
    dx = None if dx is None else dx.view(n, -1, dx.shape[-1])
    if group.is_small:
        g = g if scale == 1 else g * scale
        dh, dB = torch.bmm(g, B), torch.bmm(g.mT, h, out=into[1])
        if dx is not None:
            dx += torch.bmm(dh, A)
        return group.deliver(torch.bmm(dh.mT, x, out=into[0]), dB, into)
    dh, dB = torch.bmm(B.mT, g.mT), torch.bmm(h.mT, g)
    if scale != 1:
        dh, dB = dh * scale, dB * scale
    if dx is not None:
        dx.baddbmm_(dh.mT, A)
    return group.deliver(torch.bmm(dh, x, out=into[0]), dB.mT, into)


def _differentiable_gradients(
    ctx: Context, x: Tensor, W: Tensor, factors: Sequence[Any], g: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of all inputs by autograd through `plain_segments_linear`, so that they have gradients
    themselves.

    The base layer runs again. None for inputs that need none.
    """
    it = iter(factors)
    groups = [group._replace(A=next(it), B=next(it)) for group in ctx.groups]
    y = ctx.base(x)
    y = plain_segments_linear(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), groups)
    return differentiate(y, (x, None, None, None, None, *factors), ctx.needs_input_grad, g.view_as(y))
