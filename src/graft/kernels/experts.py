# SPDX-License-Identifier: Apache-2.0
"""Blocks of experts, a few of them for each token; the weights of the experts are stacks, dense or packed.

Rows are sorted by expert, and may have updates of their adapters. A packed stack is dequantized in chunks of at most
`BUDGET` bytes, in the forward pass and again in the backward pass: no more than one chunk is ever dense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graft.kernels.eager import Context, Function, autocast_dtype
from graft.kernels.waits import differences

BUDGET = 2**28  # bytes of matrices that are dense at once, but at least one matrix

FEW = 4  # rows: smaller products run other kernels, so that a row's bits would depend on the other rows of its expert

Span = tuple[int, int, int]  # an expert, its first row, and the row after its last


class LowRankUpdate(NamedTuple):
    """A low-rank update of a stack."""

    A: Tensor  # (experts, r, in)
    B: Tensor  # (experts, out, r)
    group: int | None = None  # the tokens that it changes; None: all
    gate: Tensor | None = None  # (tokens,): factor of the update for each token


class Form:
    """A function that makes the update of one matrix from smaller tensors. It runs again in the backward pass."""

    tensors: Sequence[Tensor]  # (experts, …)
    common_parameters: Sequence[Tensor]  # tensors of all experts, which the function reads itself
    reads: bool  # the function needs the matrix

    def __call__(self, expert: int, tensors: Sequence[Tensor], W: Tensor | None = None) -> tuple[Tensor, ...]:
        """Raise NotImplementedError here. A form returns (ΔW (out, in),), or A (r, in) and B (out, r), of an expert.

        tensors: those of the expert. W: its matrix, if `reads`.
        """
        raise NotImplementedError


class FormedUpdate(NamedTuple):
    """An update of a stack that is formed for one matrix at a time."""

    form: Form
    group: int | None = None
    gate: Tensor | None = None


StackUpdate = LowRankUpdate | FormedUpdate


class UpdatedStack(NamedTuple):
    """A stack of matrices, the updates of its adapters, and the bias of each product."""

    # (experts, out, in): a tensor, or packed matrices. These have a `shape` and `dense(experts, dtype)`, which returns
    # the matrices of some experts as tensors.
    matrices: Any
    parts: Sequence[StackUpdate] = ()
    bias: Tensor | None = None  # (experts, out)


class Routes(NamedTuple):
    """Rows sorted by expert, and within an expert by group: one row for each token and each expert that it uses."""

    order: Tensor  # (rows,): places in (tokens · k)
    tokens: Tensor  # (rows,)
    experts: Tensor  # (rows,); of rows without an expert of this process the last one
    sizes: list[int]  # rows of each expert and group
    groups: int

    @classmethod
    def of(cls, index: Tensor, experts: int, group: Tensor | None = None, groups: int = 1) -> Routes:
        """Return the rows that router indices describe, stably sorted by expert and group.

        Waits for the device to learn the sizes.

        Args:
            index: (tokens, k), the experts of each token. An index outside 0 … experts - 1 is of an expert of another
                process; its rows come last and add nothing.
            group: (tokens,), the group of each token, below `groups`.
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
        """Yield (expert, start, stop) for each expert with rows; with `group`, only the rows of that group of tokens.

        Experts without such rows are left out.
        """
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


def run_experts(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    up: UpdatedStack,
    act: Callable[[Tensor], Tensor],
    down: UpdatedStack,
    norm: Callable[[Tensor], Tensor] | None = None,
    group: Tensor | None = None,
    groups: int = 1,
) -> Tensor:
    """Return the output of a block of experts, (tokens, width), in the dtype of x.

    An expert computes norm(down(act(up x))), without the norm if it is None. Each token's output is the sum over its
    experts, weighted by `weights`, summed in at least float32. Experts of other processes add zero.

    Args:
        x: (tokens, width).
        index: (tokens, k), the experts of each token.
        weights: (tokens, k), the weight of each of these experts.
        group: (tokens,), the group of each token: an update with a group acts on its tokens only.
        groups: the number of groups.
    """
    routes = Routes.of(index, up.matrices.shape[0], group, groups)
    y = multiply_stack(act(multiply_stack(x, routes, up, gather=True)), routes, down)
    if norm is not None:
        y = norm(y)
    counts = weights.reshape(-1)[routes.order]
    local_rows = sum(routes.sizes)  # rows with an expert of this process
    if local_rows < len(counts):
        counts = counts.masked_fill(torch.arange(len(counts), device=counts.device) >= local_rows, 0)
    y = (y * counts[:, None])[routes.order.argsort()].view(*index.shape, -1)
    return y.sum(1, dtype=torch.promote_types(y.dtype, torch.float32)).to(x.dtype)


def multiply_stack(x: Tensor, routes: Routes, stack: UpdatedStack, gather: bool = False) -> Tensor:
    """Return the product of each row with its expert's updated matrix, (rows, out), plus the expert's bias.

    Rows without an expert get zeros, plus the last expert's bias. Computes in autocast's dtype if it is on, else in the
    dtype of a dense stack, else in that of x; updates in their own. Gradients flow to x and to the tensors of the
    updates, none to the stack.

    Args:
        x: (rows, in) in the order of the routes, or with `gather` (tokens, in).
    """
    auto = autocast_dtype(x.device)
    dtype = auto or (stack.matrices.dtype if isinstance(stack.matrices, Tensor) else x.dtype)
    tensors: list[Tensor | None] = []
    makers = []
    for part in stack.parts:
        gate = None if part.gate is None else part.gate[routes.tokens]
        spans = {e: (a, b) for e, a, b in routes.spans(part.group)}
        if isinstance(part, LowRankUpdate):
            part_tensors = [t if auto is None else t.to(auto) for t in (part.A, part.B)]
            makers.append(Maker(spans, part_tensors[0].dtype, None))
        else:
            form, part_tensors = part.form, [*part.form.tensors, *part.form.common_parameters]
            makers.append(Maker(spans, auto or part_tensors[0].dtype, form, len(form.tensors), len(part_tensors)))
        tensors += [None if gate is None else gate.to(makers[-1].dtype), *part_tensors]
    job = StackProduct(stack.matrices, dtype, [*routes.spans()], makers, len(routes.order))
    y = _StackProduct.apply(x, routes.tokens if gather else None, job, *tensors)
    return y if stack.bias is None else y + stack.bias[routes.experts].to(y.dtype)


class Maker(NamedTuple):
    """The facts of one update of a stack: how to form it for an expert's matrix, and its rows.

    It holds no parameters.
    """

    spans: dict[int, tuple[int, int]]  # rows, by expert
    dtype: torch.dtype  # of the update's tensors and products
    form: Form | None  # None: the tensors are A and B
    per_expert: int = 2  # tensors that have a part for each expert
    tensor_count: int = 2  # with those of all experts

    def make(self, e: int, tensors: Sequence[Tensor], W: Tensor | None) -> Sequence[Tensor]:
        """Return (ΔW,), or A and B, of expert e, formed without autocast in `dtype`. `tensors` are that expert's.

        Factors are returned as they are.
        """
        if self.form is None:
            return tensors
        with torch.autocast(tensors[0].device.type, enabled=False):
            return [t.to(self.dtype) for t in self.form(e, tensors, W)]

    def make_with_gradients(
        self, e: int, tensors: Sequence[Tensor], W: Tensor | None, need: Sequence[bool]
    ) -> tuple[Sequence[Tensor], Callable[[Sequence[Tensor]], Sequence[Tensor | None]]]:
        """Return the detached result of `make`, and a function from its gradients to the gradients of the tensors.

        The gradients are those of `tensors`, then of `common_parameters`; None for one that `need` excludes, or that
        the result does not depend on. Gradients are recorded even where autograd is off. Without a form the tensors are
        the factors themselves: they are returned as they are, and the function returns its argument.
        """
        if self.form is None:
            return tensors, lambda of_made: of_made
        leaves = [t.detach().requires_grad_(wanted) for t, wanted in zip(tensors, need)]
        with torch.enable_grad():
            update = self.make(e, leaves, W)
        inputs = [*leaves, *self.form.common_parameters]
        wanted = [t for t, needed in zip(inputs, need) if needed]

        def back(of_made: Sequence[Tensor]) -> Sequence[Tensor | None]:
            """Return the gradients of the tensors, then of the common parameters, by autograd from those of the update.

            None for a tensor without need, or one that the update does not depend on.
            """
            pairs = [(m, g) for m, g in zip(update, of_made) if m.requires_grad]
            if not (pairs and wanted):
                return [None] * len(inputs)
            some, grads = zip(*pairs)
            values = iter(torch.autograd.grad(some, wanted, grads, allow_unused=True))
            return [next(values) if needed else None for needed in need]

        return [t.detach() for t in update], back


class StackProduct(NamedTuple):
    """The facts of one product with a stack: its matrices, rows and updates."""

    matrices: Any  # as in `UpdatedStack`
    dtype: torch.dtype
    spans: list[Span]
    makers: list[Maker]
    rows: int

    @property
    def reads(self) -> bool:
        """True if a maker has a form with `reads`: that update is formed from its expert's matrix, so the backward pass
        needs the matrices.
        """
        return any(maker.form is not None and maker.form.reads for maker in self.makers)

    def densify(self, experts: Sequence[int]) -> Iterable[Tensor]:
        """Return the matrices (out, in) of some experts in `dtype`.

        A dense stack gives them one by one as they are used, as views if it has that dtype; a packed one all at once.
        """
        if isinstance(self.matrices, Tensor):
            return (self.matrices[e].to(self.dtype) for e in experts)
        return self.matrices.dense(experts, self.dtype)

    def visit_matrices(self, use: Callable[[Tensor | None, int, int, int], object], dense: bool = True) -> None:
        """Call `use(matrix, expert, start, stop)` for each expert with rows; the matrix is None if not `dense`.

        Matrices of a packed stack are dequantized in chunks of at most `BUDGET` bytes, one matrix at least. `use` must
        not keep its matrix.
        """
        if not dense:
            for span in self.spans:
                use(None, *span)
            return
        _, out_features, in_features = self.matrices.shape
        size = max(1, BUDGET // (out_features * in_features * self.dtype.itemsize))
        for i in range(0, len(self.spans), size):
            some = self.spans[i : i + size]
            for W, span in zip(self.densify([e for e, _, _ in some]), some):
                use(W, *span)
            del W  # before the next chunk is made

    def split_tensors(self, tensors: Sequence[Any]) -> list[tuple[Maker, int, Tensor | None, Sequence[Tensor]]]:
        """Return for each update its maker, the position of its gate among all tensors, its gate, and its tensors.

        `tensors` has for each update its gate or None, then as many tensors as the maker's `tensor_count`.
        """
        out, i = [], 0
        for maker in self.makers:
            end = i + 1 + maker.tensor_count
            out.append((maker, i, tensors[i], tensors[i + 1 : end]))
            i = end
        return out


def multiply_rows(x: Tensor, W: Tensor, out: Tensor) -> Tensor:
    """Write x W to `out` (rows, n) and return it.

    Fewer than `FEW` rows are padded with zeros, so that a row's bits do not depend on the others.
    """
    if len(x) >= FEW:
        return torch.mm(x, W, out=out)
    return out.copy_((nn.functional.pad(x, (0, 0, 0, FEW - len(x))) @ W)[: len(x)])


class _StackProduct(Function):
    """The function of `multiply_stack`."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, at: Tensor | None, job: StackProduct, *tensors: Tensor | None) -> Tensor:
        """Return the products of all rows with their experts' matrices and updates, (rows, out), in the job's dtype.

        Rows without an expert stay 0. Keeps x, `at`, the tensors, and v Aᵀ of each low-rank update.

        at: for each row its place in x; None: x has the rows in order. tensors: for each update its gate or None, and
        its tensors.
        """

        def rows(a: int, b: int) -> Tensor:
            """Return the rows from a to before b: a slice of x, or with `at` a gathered copy."""
            return x[a:b] if at is None else x[at[a:b]]

        y = x.new_zeros(job.rows, job.matrices.shape[1], dtype=job.dtype)
        parts = job.split_tensors(tensors)
        low: dict[tuple[int, int], Tensor] = {}  # (rows, r) of each part and expert

        def run(W: Any, e: int, a: int, b: int) -> None:
            """Write the rows a to b of expert e, cast to W's dtype, times Wᵀ to y.

            Then add the expert's updates to the rows that have them.

            An update is one full matrix or two low-rank factors. It is formed and multiplied in its dtype, times its
            gate, and cast to y's; an update without rows of this expert is passed over. Low-rank products v Aᵀ are kept
            in `low`.
            """
            multiply_rows(rows(a, b).to(W.dtype), W.T, y[a:b])
            for i, (maker, _, gate, part_tensors) in enumerate(parts):
                if e not in maker.spans:
                    continue
                a, b = maker.spans[e]
                update = maker.make(e, [t[e] for t in part_tensors[: maker.per_expert]], W)
                v = rows(a, b).to(maker.dtype)
                z = v @ update[0].T
                if len(update) > 1:  # each h in separate memory: a view's alignment would change its bits
                    low[i, e], z = z, z @ update[1].T
                y[a:b] += (z if gate is None else z * gate[a:b, None]).to(y.dtype)

        job.visit_matrices(run)
        ctx.save_for_backward(x, at, *tensors, *low.values())
        ctx.job, ctx.low = job, [*low]
        return y

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of each gate and tensor of the updates, each None without need; None for at and
        job.

        Visits the matrices one by one. They are made dense again only if x needs a gradient or an update reads them.
        Updates are formed again. The gradient of x is summed in at least float32, and cast to x's dtype. With `at` the
        gradients of rows of one token add up. Gradients of gates and tensors begin at zero, so that experts without
        rows leave zeros.
        """
        job, (x, at, *saved) = ctx.job, ctx.saved_tensors
        count = len(saved) - len(ctx.low)
        tensors, low = saved[:count], dict(zip(ctx.low, saved[count:]))
        need_x, _, _, *need = ctx.needs_input_grad
        dx = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) if need_x else None
        grads = [torch.zeros_like(t) if wanted else None for t, wanted in zip(tensors, need)]
        parts = job.split_tensors(tensors)

        def add(a: int, b: int, d: Tensor) -> None:
            """Add d, cast to the dtype of x's gradient, to rows a to b of that gradient in place, or with `at` to the
            tokens of these rows.
            """
            assert dx is not None
            if at is None:
                dx[a:b] += d
            else:
                dx.index_add_(0, at[a:b], d.to(dx.dtype))  # tokens of one expert: each once

        def run(W: Any, e: int, a: int, b: int) -> None:
            """Add the gradients of expert e's rows a to b in place.

            With need of x's gradient: g W for all these rows.

            Updates without rows of the expert are passed over. Else the update is formed again, in the maker's dtype,
            for the rows that it has there. Its gate, if that needs a gradient, gets the row sums of its product. Its
            tensors get theirs through `make_with_gradients`, weighed by the gate, and x its share. Tensors of one
            expert are added to that expert's part, common ones to the whole.
            """
            if need_x:
                add(a, b, multiply_rows(g[a:b], W, g.new_empty(b - a, W.shape[1])))
            for i, (maker, first, gate, part_tensors) in enumerate(parts):
                if e not in maker.spans:
                    continue
                a, b = maker.spans[e]
                wanted = need[first + 1 : first + 1 + len(part_tensors)]
                update, back = maker.make_with_gradients(e, [t[e] for t in part_tensors[: maker.per_expert]], W, wanted)
                v, z = (x[a:b] if at is None else x[at[a:b]]).to(maker.dtype), g[a:b].to(maker.dtype)
                dgate, out, h = grads[first], z, low.get((i, e), v)
                z = z @ update[-1]
                if dgate is not None:
                    dgate[a:b] = (z * h).sum(1)
                if gate is not None:
                    out, z = out * gate[a:b, None], z * gate[a:b, None]
                if any(wanted):
                    part_grads = back([out.T @ v] if len(update) == 1 else [z.T @ v, out.T @ h])
                    for j, grad in enumerate(part_grads):
                        total = grads[first + 1 + j]
                        if total is not None and grad is not None:
                            (total[e] if j < maker.per_expert else total).add_(grad)
                if need_x:
                    add(a, b, z if len(update) == 1 else z @ update[0])

        job.visit_matrices(run, dense=need_x or job.reads)
        return None if dx is None else dx.to(x.dtype), None, None, *grads
