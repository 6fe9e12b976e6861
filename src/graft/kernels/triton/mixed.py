# SPDX-License-Identifier: Apache-2.0
"""The function `add_groups` of `kernels/mixed.py`, for adapters of any ranks and numbers of rows. It copies neither
factors nor rows: the kernels find both by address."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from graft.kernels import mixed
from graft.kernels.function import Function
from graft.kernels.low_rank import autocast
from graft.kernels.triton import launch
from graft.kernels.triton.launch import Segments


def add_groups(
    y: Tensor,
    x: Tensor,
    factors: Sequence[tuple[Tensor, Tensor, float]],
    order: Tensor,
    sizes: Sequence[int],
    in_order: bool = False,
) -> Tensor:
    flat = autocast(x, *chain.from_iterable((A, B) for A, B, _ in factors))
    return _AddGroups.apply(y, x, order, tuple(sizes), [s for _, _, s in factors], *flat)  # type: ignore[no-any-return]


@lru_cache(maxsize=4096)  # for all layers of a model, which ask for the same at every step
def _numbers(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).view(-1, 8)


def _bits(value: float) -> int:
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


class Groups:
    """The segments of a batch, for use with one factor (n, k) per adapter."""

    def __init__(self, x: Tensor, order: Tensor, sizes: Sequence[int]):
        self.order, self.sizes = order.to(x.device), sizes
        self.tokens = x[0].numel() // x.shape[-1]
        self.rows = len(order) * self.tokens

    def using(self, factors: Sequence[Tensor], scales: Sequence[float] | None = None) -> dict[str, Any]:
        """Return arguments of a kernel: the largest factor, and the segments with the addresses of all."""
        values: list[int] = []
        start = 0
        for size, W, s in zip(self.sizes, factors, scales or [1.0] * len(factors)):
            stop = start + size * self.tokens
            values += start, stop, W.data_ptr(), *W.shape, *W.stride(), _bits(s)
            start = stop
        table = _numbers(tuple(values), self.order.device)
        segments = Segments(self.order, self.tokens, table, max(self.sizes) * self.tokens)
        return dict(b=max(factors, key=Tensor.numel), segments=segments)


class _AddGroups(Function):
    """`add_groups`, which keeps x, the factors, and h = s · x Aᵀ of the rows with an adapter."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, order: Tensor, sizes: tuple[int, ...], scales: list[float], *factors: Tensor
    ) -> Tensor:
        As, Bs = factors[::2], factors[1::2]
        groups = Groups(x, order, sizes)
        h = As[0].new_empty(groups.rows, max(map(len, As)))
        launch.product(x.reshape(-1, x.shape[-1]), out=h, mixed="a", **groups.using(As, scales))
        launch.product(h, out=y.data.view(-1, y.shape[-1]), mixed="out", add=True, **groups.using(Bs))
        ctx.save_for_backward(x, order, h, *factors)
        ctx.options = sizes, scales
        return y.data

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, order, h, *factors = ctx.saved_tensors
        sizes, scales = ctx.options
        As, Bs = factors[::2], factors[1::2]
        if torch.is_grad_enabled():  # for a second derivative: the plain form has one
            given = [t for t in (x, *factors) if t.requires_grad]
            out = mixed.plain(torch.zeros_like(g), x, [*zip(As, Bs, scales)], order, sizes)
            found = iter(torch.autograd.grad(out, given, g, create_graph=True))
            dx, *rest = (next(found) if t.requires_grad else None for t in (x, *factors))
            return g, dx, None, None, None, *rest
        groups = Groups(x, order, sizes)
        flat, rows = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        dh = torch.empty_like(h)
        down = groups.using([B.T for B in Bs], scales)
        launch.product(rows, out=dh, mixed="a", **down)
        dx = None
        if ctx.needs_input_grad[1]:
            dx = torch.zeros_like(x, memory_format=torch.contiguous_format)
            launch.product(dh, out=dx.view(flat.shape), mixed="out", **groups.using([A.T for A in As]))
        dA = h.new_empty(len(As), h.shape[1], flat.shape[1])
        dB = h.new_empty(len(Bs), rows.shape[1], h.shape[1])
        if any(ctx.needs_input_grad[5:]):
            launch.outer(dh, flat, dA, segments=down["segments"])
            launch.outer(h, rows, dB.mT, segments=down["segments"])
        grads = ((a[: len(A)], b[:, : len(A)]) for A, a, b in zip(As, dA, dB))
        return g, dx, None, None, None, *chain.from_iterable(grads)
