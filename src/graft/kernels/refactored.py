# SPDX-License-Identifier: Apache-2.0
"""A weight U M Vᵀ in place of another, as an update of it: never formed, or only within one product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding

from graft.kernels.function import Function
from graft.kernels.worth import worth_it


def plain(W: Tensor, bias: Tensor | None, x: Tensor, W0: Tensor, U: Tensor, M: Tensor, V: Tensor) -> Tensor:
    """The reference: x (W + U M Vᵀ - W0)ᵀ + bias. W, W0 and U (out, n), M and V (n, n), x (…, n) → (…, out)."""
    y = x @ W.T + x @ (U @ M @ V.T - W0).T
    return y if bias is None else y + bias


class Refactored(NamedTuple):
    """ΔW = U M Vᵀ - W, not formed yet. Only M and x get gradients."""

    W: Tensor  # (out, in, *kernel)
    U: Tensor  # (out, n)
    M: Tensor  # (n, n)
    V: Tensor  # (n, n), n = in · kernel

    @property
    def always(self) -> bool:
        """Say that `linear_with` pays for any input."""
        return True

    def dense(self) -> Tensor:
        return (self.U @ (self.M @ self.V.T)).view(self.W.shape) - self.W

    def columns(self, ids: Tensor) -> Tensor:
        """Return the columns of ΔW that `ids` (…) name: (…, out)."""
        return embedding(ids, self.V) @ self.M.T @ self.U.T - embedding(ids, self.W.T)

    def product(self, x: Tensor) -> Tensor:
        """Return x ΔWᵀ."""
        return self.narrow(x) @ self.U.T - x @ self.W.T.to(x.dtype)

    def narrow(self, x: Tensor) -> Tensor:
        """Return x V Mᵀ; form M Vᵀ before where there are more rows than that has."""
        return x @ (self.M @ self.V.T).T if x.numel() > x.shape[-1] ** 2 else x @ self.V @ self.M.T

    def linear_with(
        self, W: Tensor, bias: Tensor | None, x: Tensor, call: Callable[..., Tensor],
        input_gradient: Callable[..., Tensor],
    ) -> Tensor | None:  # fmt: skip
        """Return x (W + ΔW)ᵀ + bias, which is x (U M Vᵀ)ᵀ + bias if W is the weight that ΔW replaces; else None.

        W and bias get no gradient.

        Args:
            call: (x, weight, bias) → the output of a linear layer.
            input_gradient: (gradient of that output (rows, out), weight) → gradient of its input (rows, n).
        """
        dtype = self.M.dtype
        if W.data_ptr() != self.W.data_ptr() or torch.promote_types(W.dtype, dtype) != dtype:
            return None
        out, n = W.shape
        rows = x.numel() // n
        bias = None if bias is None else bias.to(dtype)
        if worth_it(x) and rows * (3 * n - out) > 3 * out * n:  # for products of rows, some that form the weight
            return _OneProduct.apply(x, self.U, self.M @ self.V.T, bias, call, input_gradient)  # type: ignore[no-any-return]
        y = call(self.narrow(x.to(dtype)), self.U, bias)
        return y.to(x.dtype) if y.dtype == dtype else y  # autocast chose another


class _OneProduct(Function):
    """`linear_with`, which computes in the dtype of K, and keeps all as it came."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, U: Tensor, K: Tensor, bias: Any, call: Any, input_gradient: Any) -> Tensor:
        ctx.save_for_backward(x, U, K)
        ctx.input_gradient = input_gradient
        return call(x.to(K.dtype), U @ K, bias).to(x.dtype)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, U, K = ctx.saved_tensors
        rows, flat = (t.reshape(-1, t.shape[-1]).to(K.dtype) for t in (g, x))
        dx = dK = None
        if ctx.needs_input_grad[0]:
            dx = ctx.input_gradient(rows, U @ K).to(x.dtype).view(x.shape)
        if ctx.needs_input_grad[2]:
            dK = U.T @ (rows.T @ flat)
        return dx, None, dK, None, None, None
