# SPDX-License-Identifier: Apache-2.0
"""The difference B A - B₀ A₀ of two products of high rank: added to a weight, or multiplied without being formed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding

from graft.kernels.function import Function


def plain(
    W: Tensor, bias: Tensor | None, x: Tensor, B: Tensor, A: Tensor, B0: Tensor, A0: Tensor
) -> Tensor:  # fmt: skip
    """The reference: x (W + B A - B₀ A₀)ᵀ + bias. W (out, n), B (out, r), A (r, n), x (…, n) → (…, out)."""
    y = x @ W.T + x @ (B @ A - B0 @ A0).T
    return y if bias is None else y + bias


class Difference(NamedTuple):
    """ΔW = B A - B₀ A₀, not formed yet; 0 where both products are the same. B₀ and A₀ get no gradient."""

    B: Tensor  # (out, r)
    A: Tensor  # (r, n)
    B0: Tensor
    A0: Tensor
    shape: tuple[int, ...]  # of ΔW

    def dense(self) -> Tensor:
        return (self.B @ self.A - self.B0 @ self.A0).view(self.shape)

    def columns(self, ids: Tensor) -> Tensor:
        """Return the columns of ΔW that `ids` (…) name: (…, out)."""
        return embedding(ids, self.A.T) @ self.B.T - embedding(ids, self.A0.T) @ self.B0.T

    def product(self, x: Tensor) -> Tensor | None:
        """Return x ΔWᵀ, (…, out); None if x has so many rows that forming ΔW is less work."""
        (out, r), n = self.B.shape, self.A.shape[1]
        rows = x.numel() // n
        if 2 * r * rows * (out + n) > out * n * (2 * r + rows):
            return None
        return x @ self.A.T @ self.B.T - x @ self.A0.T @ self.B0.T

    def linear_with(
        self, W: Tensor, bias: Tensor | None, x: Tensor, call: Callable[..., Tensor],
        input_gradient: Callable[..., Tensor],
    ) -> Tensor | None:  # fmt: skip
        """Return x (W + ΔW)ᵀ + bias; keep x and the factors. Return None if these have a narrower dtype than W.

        W and bias get no gradient.

        Args:
            call: (x, weight, bias) → the output of a linear layer.
            input_gradient: (gradient of that output (rows, out), weight) → gradient of its input (rows, n).
        """
        if torch.promote_types(W.dtype, self.A.dtype) != self.A.dtype:
            return None
        return _OneProduct.apply(x, W, bias, *self[:4], call, input_gradient)  # type: ignore[no-any-return]


class _OneProduct(Function):
    """`linear_with`, which computes in the dtype of the factors and rounds the output once."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Any, B: Tensor, A: Tensor, B0: Tensor, A0: Tensor, call: Any,
        input_gradient: Any,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, W, B, A, B0, A0)
        ctx.input_gradient = input_gradient
        bias = None if bias is None else bias.to(A.dtype)
        return call(x.to(A.dtype), added(W, B, A, B0, A0), bias).to(x.dtype)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, W, B, A, B0, A0 = ctx.saved_tensors
        rows, flat = (t.reshape(-1, t.shape[-1]).to(A.dtype) for t in (g, x))
        dx = dB = dA = None
        if ctx.needs_input_grad[0]:
            dx = ctx.input_gradient(rows, added(W, B, A, B0, A0)).to(x.dtype).view(x.shape)
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            dW = rows.T @ flat
            dB, dA = dW @ A.T, B.T @ dW
        return dx, None, None, dB, dA, None, None, None, None


def added(W: Tensor, B: Tensor, A: Tensor, B0: Tensor, A0: Tensor) -> Tensor:
    """Return W + B A - B₀ A₀ in the dtype of A and the memory layout of W, which may be stored as (in, out)."""
    if not W.is_contiguous():
        return added(W.T, A.T, B.T, A0.T, B0.T).T if W.T.is_contiguous() else added(W.contiguous(), B, A, B0, A0)
    return torch.addmm(torch.addmm(W.to(A.dtype), B, A), B0, A0, alpha=-1)
