# SPDX-License-Identifier: Apache-2.0
"""A block of experts, of which each token uses a few: its stacks of matrices are dense or packed, and rows have
low-rank updates of their own.

Rows are sorted by expert. Of a packed stack a chunk of matrices is dequantized at a time, and again in the backward
pass, so that no more than one chunk is ever dense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from graft.kernels.eager import Context, Function, autocast_dtype
from graft.kernels.waits import differences

BUDGET = 2**28  # bytes of matrices that are dense at once; one matrix at least is

FEW = 4  # rows: products of fewer are other functions, so that a row would depend on who else has its expert

Span = tuple[int, int, int]  # an expert, and its rows from here to there


class Codes(Protocol):
    """A stack of matrices, however it is held."""

    @property
    def shape(self) -> tuple[int, int, int]: ...  # (experts, out, in)
    @property
    def own_dtype(self) -> torch.dtype | None: ...  # in which to compute; None: that of the inputs
    def dense(self, experts: Sequence[int], dtype: torch.dtype) -> Sequence[Tensor]: ...  # matrices (out, in)


class Part(NamedTuple):
    """A low-rank update of a stack."""

    A: Tensor  # (experts, r, in)
    B: Tensor  # (experts, out, r)
    group: int | None = None  # of the tokens that it is for; None: all
    gate: Tensor | None = None  # (tokens,): what it adds counts so much


class Stack(NamedTuple):
    codes: Codes
    parts: Sequence[Part] = ()


class Block(NamedTuple):
    """What experts do with their stacks: down(act(up x)), each with a bias if it has one, and a norm after them."""

    up: str  # names of the stacks
    down: str
    act: Callable[[Tensor], Tensor]
    up_bias: Tensor | None = None  # (experts, out)
    down_bias: Tensor | None = None
    norm: Callable[[Tensor], Tensor] | None = None


class Routes(NamedTuple):
    """Rows, one for each token and expert that it uses, sorted by expert, and those of an expert by group."""

    order: Tensor  # (rows,): places in (tokens · k)
    tokens: Tensor  # (rows,)
    experts: Tensor  # (rows,); of rows without an expert of this process the last one
    sizes: list[int]  # rows of each expert and group
    groups: int

    @classmethod
    def of(cls, index: Tensor, experts: int, group: Tensor | None = None, groups: int = 1) -> Routes:
        """Sort by expert.

        Args:
            index: (tokens, k); rows of experts that are none of `experts` come last, and count nothing.
            group: (tokens,), below `groups`.
        """
        flat = index.reshape(-1)
        key = torch.where((flat < 0) | (flat >= experts), experts, flat).long()
        if group is not None:
            key = key * groups + group.repeat_interleave(index.shape[1])
        key, order = key.sort(stable=True)
        ends = torch.searchsorted(key, torch.arange(experts * groups, device=key.device), right=True)
        sizes = differences(ends, len(key))
        return cls(order, order // index.shape[1], (key // groups).clamp(max=experts - 1), sizes, groups)

    def spans(self, group: int | None = None) -> Iterator[Span]:
        """Yield the experts in use, with their rows; of one group of tokens, or all."""
        end = 0
        for expert in range(len(self.sizes) // self.groups):
            sizes = self.sizes[expert * self.groups : (expert + 1) * self.groups]
            start = end
            end += sum(sizes)
            a, b = start, end
            if group is not None:
                a += sum(sizes[:group])
                b = a + sizes[group]
            if a < b:
                yield expert, a, b

    @property
    def used(self) -> int:
        """The number of rows that have an expert."""
        return sum(self.sizes)


def routed(
    block: Block,
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    stacks: Mapping[str, Stack],
    group: Tensor | None = None,
    groups: int = 1,
) -> Tensor:
    """Return the output of a block of experts, (tokens, width), in the dtype of x.

    Args:
        x: (tokens, width).
        index: (tokens, k), the experts of each token.
        weights: (tokens, k), how much each counts.
        stacks: by name.
        group: (tokens,), by which tokens have parts.
        groups: their number.
    """
    routes = Routes.of(index, stacks[block.up].codes.shape[0], group, groups)
    y = project(x, routes, stacks[block.up], gather=True)
    if block.up_bias is not None:
        y = y + block.up_bias[routes.experts].to(y.dtype)
    y = project(block.act(y), routes, stacks[block.down])
    if block.down_bias is not None:
        y = y + block.down_bias[routes.experts].to(y.dtype)
    if block.norm is not None:
        y = block.norm(y)
    counts = weights.reshape(-1)[routes.order]
    if routes.used < len(counts):
        counts = counts.masked_fill(torch.arange(len(counts), device=counts.device) >= routes.used, 0)
    y = (y * counts[:, None])[routes.order.argsort()].view(*index.shape, -1)
    return y.sum(1, dtype=torch.promote_types(y.dtype, torch.float32)).to(x.dtype)


def project(x: Tensor, routes: Routes, stack: Stack, gather: bool = False) -> Tensor:
    """Return what a stack and its parts make of each row, (rows, out); zeros for rows without an expert.

    Args:
        x: (rows, in), or with `gather` (tokens, in).
    """
    auto = autocast_dtype(x.device)
    dtype = auto or stack.codes.own_dtype or x.dtype
    tensors: list[Tensor | None] = []
    for part in stack.parts:
        A, B = (part.A, part.B) if auto is None else (part.A.to(auto), part.B.to(auto))
        tensors += [A, B, None if part.gate is None else part.gate[routes.tokens].to(A.dtype)]
    spans = [[*routes.spans(part.group)] for part in stack.parts]
    job = Job(stack.codes, dtype, [*routes.spans()], spans, len(routes.order))
    return _Project.apply(x, routes.tokens if gather else None, job, *tensors)  # type: ignore[no-any-return]


class Job(NamedTuple):
    """What the host knows of a product."""

    codes: Codes
    dtype: torch.dtype
    spans: list[Span]
    of_parts: list[list[Span]]
    rows: int

    def each(self, use: Callable[[Tensor, int, int], object]) -> None:
        """Call `use` with each matrix in use and its rows; it must not keep the matrix."""
        _, out_features, in_features = self.codes.shape
        size = max(1, BUDGET // (out_features * in_features * self.dtype.itemsize))
        for i in range(0, len(self.spans), size):
            some = self.spans[i : i + size]
            for W, (_, a, b) in zip(self.codes.dense([e for e, _, _ in some], self.dtype), some):
                use(W, a, b)
            del W  # before the next chunk is made


def product(x: Tensor, W: Tensor, out: Tensor) -> Tensor:
    """Return x W in `out`, (rows, n), each row with the bits that it has among more of them."""
    if len(x) >= FEW:
        return torch.mm(x, W, out=out)
    return out.copy_((nn.functional.pad(x, (0, 0, 0, FEW - len(x))) @ W)[: len(x)])


class _Project(Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, at: Tensor | None, job: Job, *tensors: Any) -> Tensor:
        def rows(a: int, b: int) -> Tensor:
            return x[a:b] if at is None else x[at[a:b]]

        y = x.new_zeros(job.rows, job.codes.shape[1], dtype=job.dtype)
        job.each(lambda W, a, b: product(rows(a, b).to(W.dtype), W.T, y[a:b]))
        low = []  # (rows, r) of each part and expert
        for A, B, gate, spans in zip(tensors[::3], tensors[1::3], tensors[2::3], job.of_parts):
            for e, a, b in spans:  # each h in memory of its own: its place would change its bits
                low.append(rows(a, b).to(A.dtype) @ A[e].T)
                z = low[-1] @ B[e].T
                y[a:b] += (z if gate is None else z * gate[a:b, None]).to(y.dtype)
        ctx.save_for_backward(x, at, *tensors, *low)
        ctx.job = job
        return y

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> tuple[Tensor | None, ...]:
        job, (x, at, *saved) = ctx.job, ctx.saved_tensors
        count = len(job.of_parts)
        tensors, low = saved[: 3 * count], iter(saved[3 * count :])
        need_x, _, _, *need = ctx.needs_input_grad
        dx = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) if need_x else None

        def add(a: int, b: int, d: Tensor) -> None:
            assert dx is not None
            if at is None:
                dx[a:b] += d
            else:
                dx.index_add_(0, at[a:b], d.to(dx.dtype))  # tokens of one expert: each once

        if need_x:
            job.each(lambda W, a, b: add(a, b, product(g[a:b], W, g.new_empty(b - a, W.shape[1]))))
        grads = [torch.zeros_like(t) if wanted else None for t, wanted in zip(tensors, need)]
        for i, spans in enumerate(job.of_parts):
            (A, B, gate), (dA, dB, dgate) = tensors[3 * i : 3 * i + 3], grads[3 * i : 3 * i + 3]
            for (e, a, b), h in zip(spans, low):
                own = g[a:b].to(A.dtype)
                z = own @ B[e]
                if dgate is not None:
                    dgate[a:b] = (z * h).sum(1)
                if gate is not None:
                    own, z = own * gate[a:b, None], z * gate[a:b, None]
                if dB is not None:
                    torch.mm(own.T, h, out=dB[e])
                if dA is not None:
                    torch.mm(z.T, (x[a:b] if at is None else x[at[a:b]]).to(A.dtype), out=dA[e])
                if need_x:
                    add(a, b, z @ A[e])
        return None if dx is None else dx.to(x.dtype), None, None, *grads


def plain(
    block: Block,
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    stacks: Mapping[str, Stack],
    group: Tensor | None = None,
) -> Tensor:
    """The reference: token by token, with dense matrices."""

    def product(name: str, v: Tensor, e: int, t: int) -> Tensor:
        codes, parts = stacks[name]
        y = codes.dense([e], v.dtype)[0] @ v
        for A, B, own, gate in parts:
            if own is None or (group is not None and own == int(group[t])):
                y = y + B[e] @ (A[e] @ v) * (1 if gate is None else gate[t])
        bias = block.up_bias if name == block.up else block.down_bias
        return y if bias is None else y + bias[e]

    out = []
    for t, v in enumerate(x):
        y = torch.zeros_like(v)
        for e, w in zip(index[t].tolist(), weights[t]):
            if 0 <= e < stacks[block.up].codes.shape[0]:
                z = product(block.down, block.act(product(block.up, v, e, t)), e, t)
                y = y + w * (z if block.norm is None else block.norm(z))
        out.append(y)
    return torch.stack(out)
