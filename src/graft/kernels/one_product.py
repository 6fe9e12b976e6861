# SPDX-License-Identifier: Apache-2.0
"""The linear layer x (W + ΔW)ᵀ + b: one product where x Wᵀ + x ΔWᵀ takes two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from graft.kernels.function import Function


def plain(W: Tensor, bias: Tensor | None, x: Tensor, delta: Tensor) -> Tensor:
    """The reference. W and delta (out, n), x (…, n), bias (out,) → (…, out)."""
    y = x @ W.T + x @ delta.T
    return y if bias is None else y + bias


def linear_with(
    W: Tensor, bias: Tensor | None, x: Tensor, delta: Tensor, call: Callable[..., Tensor],
    input_gradient: Callable[..., Tensor],
) -> Tensor:  # fmt: skip
    """Compute `plain`. W gets no gradient. The backward pass forms the sum again, so that nothing keeps it.

    Args:
        call: (x, weight, bias) → the output of a linear layer.
        input_gradient: (gradient of that output (rows, out), weight) → gradient of its input (rows, n).
    """
    return _OneProduct.apply(x, delta, W, bias, call, input_gradient)  # type: ignore[no-any-return]


class _OneProduct(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, W: Tensor, bias: Any, call: Any, input_gradient: Any) -> Tensor:
        ctx.save_for_backward(x, delta, W)
        ctx.input_gradient = input_gradient
        return call(x, W + delta, bias)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, delta, W = ctx.saved_tensors
        rows = g.reshape(-1, g.shape[-1])
        dx = ddelta = dbias = None
        if ctx.needs_input_grad[0]:
            dx = ctx.input_gradient(rows, W + delta).view(x.shape)
        if ctx.needs_input_grad[1]:
            ddelta = rows.T @ x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[3]:
            dbias = rows.sum(0)
        return dx, ddelta, None, dbias, None, None
