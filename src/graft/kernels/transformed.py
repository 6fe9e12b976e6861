# SPDX-License-Identifier: Apache-2.0
"""Products with Σ_p S_p M_p T_pᵀ, where each M has few entries, and S and T have fast transforms.

The work grows with the samples and with the entries, never with the size of the matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from graft.kernels.eager import eager, only_backward
from graft.kernels.function import Function

AT_ONCE = 1 << 18  # numbers that `sampled` gathers at once: few enough for the cache


Parts = Sequence[Tensor]  # for each part, (size, samples)


class Basis(Protocol):
    """A matrix S (n, parts · size) with fast transforms. M acts on each part of its columns apart."""

    @property
    def n(self) -> int: ...
    @property
    def size(self) -> int: ...

    def analysis(self, x: Tensor) -> Parts: ...  # x (samples, n) → Sᵀ xᵀ
    def synthesis(self, z: Parts) -> Tensor: ...  # z → (S D⁻¹ z)ᵀ, (samples, n)
    def factors(self, index: Tensor) -> Tensor: ...  # D[index], which `synthesis` leaves to its caller
    def at(self, index: Tensor, q: Tensor, dtype: torch.dtype) -> Parts: ...  # S[q, index], (indices, samples)


class Sparse(NamedTuple):
    """Σ_p S_p M_p T_pᵀ, not formed yet. M_p[rows[e], cols[e]] is the sum of values[p, e] over all such e."""

    values: Tensor  # (parts, entries)
    rows: Tensor  # (entries,)
    cols: Tensor
    S: Basis
    T: Basis
    shape: tuple[int, ...]  # of the weight that it updates

    def dense(self) -> Tensor:
        """Return the whole matrix of one part."""
        S, T = self.S, self.T
        values = self.values[0] * S.factors(self.rows) * T.factors(self.cols)
        M = values.new_zeros(S.size, T.size).index_put((self.rows, self.cols), values, accumulate=True)
        return T.synthesis([S.synthesis([M])]).reshape(self.shape)

    def columns(self, ids: Tensor) -> Tensor:
        """Return the columns that `ids` (…) name: (…, n of S)."""
        q, values = ids.flatten(), self.values * self.S.factors(self.rows)
        picked = [v[:, None] * t for v, t in zip(values, self.T.at(self.cols, q, values.dtype))]  # (entries, ids)
        z = [p.new_zeros(self.S.size, len(q)).index_add(0, self.rows, p) for p in picked]
        return self.S.synthesis(z).reshape(*ids.shape, -1)

    def times(self, x: Tensor) -> Tensor:
        """Compute `plain`, in float32 at least; keep x and the entries for the backward pass."""
        dtype = torch.promote_types(torch.promote_types(x.dtype, self.values.dtype), torch.float32)
        if not x.numel():  # transforms take no empty batch
            return x.to(dtype).new_zeros(*x.shape[:-1], self.S.n) + 0 * (x.sum() + self.values.sum())
        function = _Product.apply if only_backward() else plain
        return function(x.to(dtype), self.values.to(dtype), self.rows, self.cols, self.S, self.T)  # type: ignore[no-any-return]


def plain(x: Tensor, values: Tensor, rows: Tensor, cols: Tensor, S: Basis, T: Basis) -> Tensor:
    """The reference of `Sparse.times`. x (…, n of T) → (…, n of S)."""
    flat = x.reshape(-1, x.shape[-1])
    return through(values, cols, T.analysis(flat), rows, S).reshape(*x.shape[:-1], -1)


def through(values: Tensor, source: Tensor, z: Parts, target: Tensor, S: Basis) -> Tensor:
    """Add values[p, e] times row source[e] of z to row target[e] of zeros, and return the synthesis of that."""
    values = values * S.factors(target)
    if eager():
        order, starts = sorted_by(target, S.size)
        pick, values = source[order], values[:, order]
        return S.synthesis(
            [embedding_bag(pick, p, starts, mode="sum", per_sample_weights=v) for p, v in zip(z, values)]
        )
    sums = (p.new_zeros(S.size, p.shape[1]).index_add(0, target, v[:, None] * p[source]) for p, v in zip(z, values))
    return S.synthesis(list(sums))


def sorted_by(target: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the order that sorts `target`, and where each number below `size` begins in it."""
    order = target.argsort()
    return order, torch.searchsorted(target[order], torch.arange(size, device=order.device))


def sampled(G: Parts, rows: Tensor, z: Parts, cols: Tensor) -> Tensor:
    """Return Σ_samples G[p][rows[e]] z[p][cols[e]], (parts, entries)."""
    if eager() and not torch.is_grad_enabled():
        order, starts = sorted_by(rows, len(G[0]))
        values, pick = [p.new_zeros(len(rows)).requires_grad_() for p in z], cols[order]
        with torch.enable_grad():  # they are the derivatives of such sums by their weights
            sums = [embedding_bag(pick, p, starts, mode="sum", per_sample_weights=v) for p, v in zip(z, values)]
            return torch.stack(torch.autograd.grad(sums, values, G))[:, order.argsort()]
    step = max(1, AT_ONCE // z[0].shape[1]) if eager() else len(rows)
    pairs = list(zip(rows.split(step), cols.split(step)))
    return torch.stack([torch.cat([(g[r] * p[c]).sum(1) for r, c in pairs]) for g, p in zip(G, z)])


class _Product(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, values: Tensor, rows: Tensor, cols: Tensor, S: Any, T: Any) -> Tensor:
        return plain(x, values, rows, cols, S, T)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.S, ctx.T = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, values, rows, cols = ctx.saved_tensors
        G, dx, dvalues = ctx.S.analysis(g.reshape(-1, g.shape[-1])), None, None
        if ctx.needs_input_grad[0]:
            dx = through(values, rows, G, cols, ctx.T).reshape(x.shape)
        if ctx.needs_input_grad[1]:
            dvalues = sampled(G, rows, ctx.T.analysis(x.reshape(-1, x.shape[-1])), cols)
        return dx, dvalues, None, None, None, None
