# SPDX-License-Identifier: Apache-2.0
"""The sum y + b ⊙ ((d ⊙ (x Aᵀ)) Bᵀ), A and B fixed: in y's own memory, or in one product with the weight behind y.

Of the activations the backward pass needs only x Aᵀ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graft.kernels import products
from graft.kernels.function import Function
from graft.kernels.one_product import Call, InputGradient
from graft.kernels.worth import worth_it


def plain(y: Tensor, h: Tensor, B: Tensor, d: Tensor, b: Tensor) -> Tensor:
    """The reference, from h = x Aᵀ. y (…, out), h (…, r), B (out, r), d (r,), b (out,)."""
    return (y + nn.functional.linear(h * d, B) * b).to(y.dtype)


def add_scaled(y: Tensor, h: Tensor, B: Tensor, d: Tensor, b: Tensor) -> Tensor:
    """Compute `plain`. y's memory may hold the result, so nothing else may need its values. B gets no gradient."""
    return _AddScaled.apply(y, h, B, d, b) if worth_it(h) else plain(y, h, B, d, b)  # type: ignore[no-any-return]


def one_product_pays(rows: int, out: int, n: int) -> bool:
    """Say whether forming W + ΔW, once in each direction, costs less than three products with the factors.

    The costs are 2 out · n and rows (2 out + n), times r. The sums with W come on top: hence 3.
    """
    return 3 * out * n < rows * (2 * out + n)


def linear_with(
    W: Tensor, bias: Tensor | None, x: Tensor, A: Tensor, B: Tensor, d: Tensor, b: Tensor,
    call: Call, input_gradient: InputGradient,
) -> Tensor:  # fmt: skip
    """Compute `plain` for y = x Wᵀ + bias, as x (W + ΔW)ᵀ + bias: one product for both, where `one_product_pays`.

    Only d, b and x get gradients. All have one dtype.
    """
    h = x.reshape(-1, x.shape[-1]) @ A.T
    return _OneProduct.apply(x, h, W, bias, A, B, d, b, call, input_gradient)  # type: ignore[no-any-return]


def vector_gradients(
    G: Tensor, B: Tensor, d: Tensor, b: Tensor, need: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of d and b from G = gᵀ h (out, r), without another product of the width of y."""
    dd = b @ (G * B) if need[0] else None
    db = (G * B) @ d if need[1] else None
    return dd, db


class _AddScaled(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, B: Tensor, d: Tensor, b: Tensor) -> Tensor:
        flat = h.reshape(-1, h.shape[-1])
        ctx.save_for_backward(h, B, d, b)
        return products.add_up(y.data, flat * d, b[:, None] * B, 1.0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        h, B, d, b = ctx.saved_tensors
        flat = h.reshape(-1, h.shape[-1])
        rows = g.reshape(-1, g.shape[-1]).to(h.dtype)
        scaled = b[:, None] * B
        dd, db = vector_gradients(products.outer_wide(rows, flat, 1.0), B, d, b, ctx.needs_input_grad[3:])
        dh = (products.down(rows, scaled.T) * d).view(h.shape) if ctx.needs_input_grad[1] else None
        return g, dh, None, dd, db


class _OneProduct(Function):
    """`linear_with`. The caller makes h = x Aᵀ, so that a second derivative finds x. The gradient of x includes h's."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h: Tensor, W: Tensor, bias: Any, A: Tensor, B: Tensor, d: Tensor, b: Tensor,
        call: Any, input_gradient: Any,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(h, W, A, B, d, b)
        ctx.input_gradient = input_gradient
        return call(x, _sum(W, A, B, d, b), bias)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        h, W, A, B, d, b = ctx.saved_tensors
        rows = g.reshape(-1, g.shape[-1])
        dx = None
        if ctx.needs_input_grad[0]:
            dx = ctx.input_gradient(rows, _sum(W, A, B, d, b)).view(*g.shape[:-1], A.shape[1])
        dd, db = vector_gradients(rows.T @ h, B, d, b, ctx.needs_input_grad[6:8])
        return dx, None, None, None, None, None, dd, db, None, None


def _sum(W: Tensor, A: Tensor, B: Tensor, d: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(W, b[:, None] * B, d[:, None] * A)
