# SPDX-License-Identifier: Apache-2.0
"""Products with a Kronecker product of two matrices, which nothing forms."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding

from graft.kernels.eager import autocast_dtype, only_backward
from graft.kernels.function import Function


class Kronecker(NamedTuple):
    """The matrix a ⊗ b, not formed yet."""

    a: Tensor  # (l, m)
    b: Tensor  # (k, n)
    shape: tuple[int, ...]  # of the weight that it updates: l k rows, m n columns

    def dense(self) -> Tensor:
        return torch.kron(self.a, self.b).reshape(self.shape)

    def columns(self, ids: Tensor) -> Tensor:
        """Return the columns that `ids` (…) name: (…, l k)."""
        n = self.b.shape[1]
        a, b = embedding(ids // n, self.a.T), embedding(ids % n, self.b.T)
        return (a[..., :, None] * b[..., None, :]).flatten(-2)


def plain(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The reference. x (…, m n), a (l, m), b (k, n) → (…, l k)."""
    return x @ torch.kron(a, b).T


def product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Compute `plain`, in the dtype of autocast if it is on; keep x, a and b for the backward pass."""
    dtype = autocast_dtype(x.device) or torch.promote_types(x.dtype, torch.promote_types(a.dtype, b.dtype))
    function = _Product.apply if only_backward() else multiplied
    return function(x.to(dtype), a.to(dtype), b.to(dtype))  # type: ignore[no-any-return]


def last_first(a: Tensor, b: Tensor) -> bool:
    """Say whether it is cheaper to multiply by b before a."""
    (l, m), (k, n) = a.shape, b.shape
    return m * k * (n + l) <= l * n * (m + k)


def multiplied(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return a X bᵀ for each row X (m, n) of x, flat."""
    X = x.reshape(-1, a.shape[1], b.shape[1])
    Y = a @ (X @ b.T) if last_first(a, b) else (a @ X) @ b.T
    return Y.reshape(*x.shape[:-1], a.shape[0] * b.shape[0])


class _Product(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return multiplied(x, a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b = ctx.saved_tensors
        X, G = x.reshape(-1, a.shape[1], b.shape[1]), g.reshape(-1, a.shape[0], b.shape[0])
        dx = da = db = None
        if last_first(a, b):
            T = a.T @ G  # (rows, m, k)
            if ctx.needs_input_grad[0]:
                dx = (T @ b).view(x.shape)
            if ctx.needs_input_grad[2]:
                db = T.flatten(0, 1).T @ X.flatten(0, 1)
            if ctx.needs_input_grad[1]:
                da = G.transpose(0, 1).flatten(1) @ (X @ b.T).transpose(0, 1).flatten(1).T
        else:
            T = G @ b  # (rows, l, n)
            if ctx.needs_input_grad[0]:
                dx = (a.T @ T).reshape(x.shape)
            if ctx.needs_input_grad[1]:
                da = T.transpose(0, 1).flatten(1) @ X.transpose(0, 1).flatten(1).T
            if ctx.needs_input_grad[2]:
                db = G.flatten(0, 1).T @ (a @ X).flatten(0, 1)
        return dx, da, db


def factorization(n: int, factor: int) -> tuple[int, int]:
    """Return (a, b), a ≤ b and a b = n, as near to each other as it goes with a ≤ `factor`; -1 sets no limit.

    If `factor` divides n, a is `factor`, and may be the larger one.
    """
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    limit = n if factor == -1 else factor
    best = (1, n)
    for a in range(1, n + 1):
        if n % a == 0:
            b = n // a
            if a + b > sum(best) or a > limit:
                break
            best = (a, b)
    return min(best), max(best)
