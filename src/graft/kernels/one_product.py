# SPDX-License-Identifier: Apache-2.0
"""The linear layer x (W + ΔW)ᵀ + b: one product where x Wᵀ + x ΔWᵀ takes two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
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


def plain_low_rank(W: Tensor, bias: Tensor | None, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The reference of `low_rank_with`: x Wᵀ + s · x Aᵀ Bᵀ + bias. A (r, n), B (out, r)."""
    y = x @ W.T + (x @ A.T @ B.T) * scale
    return y if bias is None else y + bias


def low_rank_pays(rows: int, out: int, n: int, r: int, need_A: bool, need_B: bool) -> bool:
    """Say whether forming W + s · B A, once in each direction, costs less in training than products with the factors.

    That is so where r is a good part of n or `out`. `need_…`: the factor gets a gradient, by way of that of W.
    """
    apart = rows * r * ((2 + need_A) * n + (2 + need_B) * out)
    return out * n * ((2 + need_A + need_B) * r + rows) < apart


def low_rank_with(
    W: Tensor, bias: Tensor | None, x: Tensor, A: Tensor, B: Tensor, scale: float, call: Callable[..., Tensor],
    input_gradient: Callable[..., Tensor],
) -> Tensor:  # fmt: skip
    """Compute `plain_low_rank` by one product; keep x and the factors. All have one dtype. W gets no gradient."""
    return _LowRank.apply(x, A, B, W, bias, scale, call, input_gradient)  # type: ignore[no-any-return]


class _LowRank(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, W: Tensor, bias: Any, scale: float, call: Any, input_gradient: Any
    ) -> Tensor:
        ctx.save_for_backward(x, A, B, W)
        ctx.scale, ctx.input_gradient = scale, input_gradient
        return call(x, torch.addmm(W, B, A, alpha=scale), bias)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, A, B, W = ctx.saved_tensors
        rows = g.reshape(-1, g.shape[-1])
        dx = dA = dB = None
        if ctx.needs_input_grad[0]:
            dx = ctx.input_gradient(rows, torch.addmm(W, B, A, alpha=ctx.scale)).view(x.shape)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            G = rows.T @ x.reshape(-1, x.shape[-1])
            dA = (B.T @ G) * ctx.scale if ctx.needs_input_grad[1] else None
            dB = (G @ A.T) * ctx.scale if ctx.needs_input_grad[2] else None
        return dx, dA, dB, None, None, None, None, None
