# SPDX-License-Identifier: Apache-2.0
"""Products with structured matrices without forming them: low-rank blocks, repeated shards, Kronecker products, and
diagonals around a fixed matrix.

A matrix of k × k low-rank blocks has (A_n[:, j] B_j[n, :])ᵀ as block (j, n). A_n (in / k, r) maps part n of the input
to r numbers. Chunk j of them goes to part j of the output, where B_j (r, out / k) takes the chunks of all n.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from graft.kernels.eager import Context, Function, VmapFunction, autocast_dtype, eager, only_backward


class Inputs(NamedTuple):
    """x ↦ the chunks (j, n) of A_n x_n, then `general` of all of x: (…, in) → (…, k r + s)."""

    A: Tensor  # (k, in / k, r)
    general: nn.Linear | None = None  # a linear layer to s numbers

    def __call__(self, x: Tensor) -> Tensor:
        """Map x (…, in) to (…, k r + s): chunk (j, n) of the result is chunk j of A_n x_n; then the outputs of
        `general`.
        """
        k, width, r = self.A.shape
        z = torch.bmm(x.reshape(-1, k, width).transpose(0, 1), self.A)  # (n, rows, j · chunk)
        z = z.unflatten(-1, (k, -1)).permute(1, 2, 0, 3).reshape(*x.shape[:-1], k * r)
        return z if self.general is None else torch.cat((z, self.general(x)), -1)

    @property
    def weight(self) -> Tensor:
        """The matrix of the map as a dense tensor, (k r + s, in): blocks placed among zeros, then the weight of
        `general`.
        """
        rows = torch.block_diag(*self.A.mT)  # (n · j · chunk, in)
        blocks = rows.unflatten(0, (len(self.A), len(self.A), -1)).transpose(0, 1).flatten(0, 2)
        return blocks if self.general is None else torch.cat((blocks, self.general.weight))


class Outputs(NamedTuple):
    """z ↦ B_j of the chunks (j, n), and `general` of the last s numbers: (…, k r + s) → (…, out)."""

    B: Tensor  # (k, r, out / k)
    general: nn.Linear | None = None  # a linear layer of s numbers

    def __call__(self, z: Tensor) -> Tensor:
        """Map z (…, k r + s) to (…, out): part j is B_j of chunks j, all n; plus `general` of the last s numbers."""
        k, r, width = self.B.shape
        blocks = z[..., : k * r].reshape(-1, k, r).transpose(0, 1)
        y = torch.bmm(blocks, self.B).transpose(0, 1).reshape(*z.shape[:-1], k * width)
        return y if self.general is None else y + self.general(z[..., k * r :])

    @property
    def weight(self) -> Tensor:
        """The matrix of the map as a dense tensor, (out, k r + s): blocks placed among zeros, then the weight of
        `general`.
        """
        blocks = torch.block_diag(*self.B.mT)
        return blocks if self.general is None else torch.cat((blocks, self.general.weight), 1)


class Shards(NamedTuple):
    """x ↦ (x₀ + x_r + x_2r + …, x₁ + x_r+1 + …, …): the product with identity matrices side by side."""

    r: int
    fan_in: int
    like: Tensor  # has the dtype and device that `weight` gets

    def __call__(self, x: Tensor) -> Tensor:
        """Return (…, r): the sum of the pieces of r consecutive features of x (…, fan_in).

        A shorter last piece is filled up with zeros.
        """
        whole = self.fan_in - self.fan_in % self.r
        z = x[..., :whole].unflatten(-1, (-1, self.r)).sum(-2)
        return z if whole == self.fan_in else z + nn.functional.pad(x[..., whole:], (0, self.r - self.fan_in + whole))

    @property
    def weight(self) -> Tensor:
        """The matrix (r, fan_in) of identity matrices next to each other, cut to fan_in columns."""
        eye = torch.eye(self.r, dtype=self.like.dtype, device=self.like.device)
        return eye.repeat(1, -(-self.fan_in // self.r))[:, : self.fan_in]


class Repeated(NamedTuple):
    """z ↦ z [D D …]."""

    D: Tensor  # (r, out / times)
    times: int

    def __call__(self, z: Tensor) -> Tensor:
        """Return z D, for z (…, r), repeated `times` times along the last dimension: (…, out)."""
        y = z @ self.D
        return y if self.times == 1 else y.repeat(*[1] * (y.dim() - 1), self.times)

    @property
    def weight(self) -> Tensor:
        """The matrix [D D …]ᵀ, (out, r), with `times` copies; a view for one."""
        return (self.D if self.times == 1 else self.D.repeat(1, self.times)).T


class Kronecker(NamedTuple):
    """The matrix a ⊗ b, not formed yet."""

    a: Tensor  # (l, m)
    b: Tensor  # (k, n)
    shape: tuple[int, ...]  # of the weight that it updates: l k rows, m n columns

    def dense(self) -> Tensor:
        """Return a ⊗ b in `shape`."""
        return torch.kron(self.a, self.b).reshape(self.shape)

    def columns(self, ids: Tensor) -> Tensor:
        """Return the columns of a ⊗ b that `ids` (…) name: (…, l k), from columns of a and b alone."""
        n = self.b.shape[1]
        a, b = embedding(ids // n, self.a.T), embedding(ids % n, self.b.T)
        return (a[..., :, None] * b[..., None, :]).flatten(-2)


def multiply_kronecker(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return x (a ⊗ b)ᵀ, (…, l k), without forming the matrix; keep x, a and b for the backward pass.

    Computes in the dtype of autocast if it is on, else in the widest of the three. x (…, m n), a (l, m), b (k, n).
    """
    dtype = autocast_dtype(x.device) or torch.promote_types(x.dtype, torch.promote_types(a.dtype, b.dtype))
    function = _KroneckerProduct.apply if only_backward() else multiply_kronecker_rows
    return function(x.to(dtype), a.to(dtype), b.to(dtype))


def is_b_first(a: Tensor, b: Tensor) -> bool:
    """Return True if multiplying by b before a takes no more multiplications than the reverse. a (l, m), b (k, n)."""
    (l, m), (k, n) = a.shape, b.shape
    return m * k * (n + l) <= l * n * (m + k)


def multiply_kronecker_rows(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return a X bᵀ, flattened to (…, l k), for each row of x taken as a matrix X (m, n), in the cheaper order."""
    X = x.reshape(-1, a.shape[1], b.shape[1])
    Y = a @ (X @ b.T) if is_b_first(a, b) else (a @ X) @ b.T
    return Y.reshape(*x.shape[:-1], a.shape[0] * b.shape[0])


class _KroneckerProduct(VmapFunction):
    """The function of `multiply_kronecker`."""

    @staticmethod
    def forward(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return x (a ⊗ b)ᵀ."""
        return multiply_kronecker_rows(x, a, b)

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, a and b, each None without need. That of x has x's shape.

        One product of g, with a if `is_b_first(a, b)` and else with b, is formed once and shared by the gradients of x
        and of the other factor.
        """
        x, a, b = ctx.saved_tensors
        X, G = x.reshape(-1, a.shape[1], b.shape[1]), g.reshape(-1, a.shape[0], b.shape[0])
        dx = da = db = None
        if is_b_first(a, b):
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
    """Return (a, b) with a b = n, a ≤ b, as near to each other as possible with a ≤ `factor`; -1 sets no limit.

    The worst case is (1, n).

    If a positive `factor` divides n, a is `factor`, even if that is larger than b.
    """
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    limit = n if factor == -1 else factor
    a = max([1, *[a for a in range(2, min(limit, math.isqrt(n)) + 1) if n % a == 0]])  # a list: torch.compile takes it
    return a, n // a


def plain_diagonals(left: Tensor, A: Tensor, right: Tensor) -> Tensor:
    """Return left_j ⊙ A_j ⊙ right of each row j, (r · n, d), by plain operations; the reference of `between_diagonals`.

    Row j · n + i is left[j, i] · A[j] ⊙ right[i]. left (r, n), A (r, d), right (n, d).
    """
    return (left[..., None] * A[:, None] * right).flatten(0, 1)


def between_diagonals(left: Tensor, A: Tensor, right: Tensor) -> Tensor:
    """Return left_j ⊙ A_j ⊙ right of each row j, (r · n, d), and keep only the arguments for the backward pass.

    A gets no gradient. Without gradients, and under compilers, tracers and transforms, it is the plain operation, which
    gives A one. left (r, n), A (r, d), right (n, d).
    """
    if not (torch.is_grad_enabled() and eager()):
        return plain_diagonals(left, A, right)
    return _BetweenDiagonals.apply(left, A, right)


class _BetweenDiagonals(Function):
    """The function of `between_diagonals`."""

    @staticmethod
    def forward(ctx: Context, left: Tensor, A: Tensor, right: Tensor) -> Tensor:
        """Return the product (r · n, d). Keeps left, A and right."""
        ctx.save_for_backward(left, A, right)
        return plain_diagonals(left, A, right)

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> tuple[Tensor, None, Tensor]:
        """Return the gradients of left (r, n) and right (n, d), both always; None for A."""
        left, A, right = ctx.saved_tensors
        inner = g.view(*left.shape, A.shape[1]) * A[:, None]
        return torch.einsum("rnd,nd->rn", inner, right), None, torch.einsum("rnd,rn->nd", inner, left)
