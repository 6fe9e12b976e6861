# SPDX-License-Identifier: Apache-2.0
"""The matrix (a b) ⊙ (c d): dense, as factors of rank r², or within one product, added to a weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding

from graft.kernels.eager import only_backward
from graft.kernels.function import Function
from graft.kernels.one_product import Call, InputGradient, linear_with


def plain(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """The reference. a, c (out, r), b, d (r, n) → (out, n)."""
    return (a @ b) * (c @ d)


def is_narrow(r: int, out: int, n: int) -> bool:
    """Say whether factors of rank r² are the better choice: less work, at most half of the dense matrix's memory."""
    return 2 * r * r * (out + n) < out * n


def narrow(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Return (A, B) with (a b) ⊙ (c d) = B A: products of all pairs of rows, of columns. A (r², n), B (out, r²)."""
    return (b[:, None] * d).flatten(0, 1), (a[:, :, None] * c[:, None]).flatten(1)


class Hadamard(NamedTuple):
    """ΔW = scale · (a b) ⊙ (c d), not formed yet."""

    a: Tensor  # (out, r)
    b: Tensor  # (r, n)
    c: Tensor
    d: Tensor
    scale: float
    shape: tuple[int, ...]  # of ΔW

    def dense(self) -> Tensor:
        return self.scale * product(*self[:4]).reshape(self.shape)

    def columns(self, ids: Tensor) -> Tensor:
        """Return the columns of ΔW that `ids` (…) name: (…, out)."""
        return self.scale * (embedding(ids, self.b.T) @ self.a.T) * (embedding(ids, self.d.T) @ self.c.T)

    def product(self, x: Tensor) -> None:
        """Say that for few rows, too, the matrix has to be formed."""

    def linear_with(
        self, W: Tensor, bias: Tensor | None, x: Tensor, call: Call, input_gradient: InputGradient
    ) -> Tensor | None:
        """Return x (W + ΔW)ᵀ + bias; None where the sum would round ΔW."""
        return linear_with(W, bias, x, self, call, input_gradient) if W.dtype == self.a.dtype else None

    def added(self, W: Tensor) -> Tensor:
        return torch.addcmul(W, self.a @ self.b, self.c @ self.d, value=self.scale)

    def gradients(self, g: Tensor, x: Tensor, need: Sequence[bool]) -> tuple[Tensor | None, ...]:
        return *factor_gradients((g.T @ x) * self.scale, *self[:4]), None, None


def product(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Compute `plain`; keep only the factors for the backward pass, as the products are as large as the weight."""
    return _Product.apply(a, b, c, d) if only_backward() else plain(a, b, c, d)  # type: ignore[no-any-return]


class _Product(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return (a @ b) * (c @ d)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return factor_gradients(grad, *ctx.saved_tensors)


def factor_gradients(grad: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of a, b, c and d from that of (a b) ⊙ (c d)."""
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.promote_types(c.dtype, d.dtype))
    a, b, c, d = (t.to(wide) for t in (a, b, c, d))  # autocast may have made some of them
    left = grad * (c @ d)
    right = grad * (a @ b)
    return left @ b.T, a.T @ left, right @ d.T, c.T @ right
