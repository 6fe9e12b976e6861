# SPDX-License-Identifier: Apache-2.0
"""The linear layer x (W + ΔW)ᵀ + b: one product where x Wᵀ + x ΔWᵀ takes two. Each ΔW says how to add it to W."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from graft.kernels.function import Function

Call = Callable[..., Tensor]  # (x, weight, bias) → the output of a linear layer
InputGradient = Callable[..., Tensor]  # (gradient of that output (rows, out), weight) → gradient of its input (rows, n)


class Addend(Protocol):
    """ΔW (out, n): a NamedTuple of tensors, and of facts."""

    def __iter__(self) -> Iterator[Any]: ...
    def added(self, W: Any) -> Tensor: ...  # W + ΔW, in the dtype in which to compute

    # of all fields, from the gradient of the output (rows, out) and x (rows, n). need: which fields get one
    def gradients(self, g: Tensor, x: Tensor, need: Sequence[bool]) -> Sequence[Tensor | None]: ...


def linear_with(
    W: Tensor | None, bias: Tensor | None, x: Tensor, delta: Addend, call: Call, input_gradient: InputGradient
) -> Tensor:
    """Return x (W + ΔW)ᵀ + bias; keep x, W and the fields of ΔW, of which the backward pass forms the sum again.

    Compute in the dtype of the sum, and round the output once. W gets no gradient.

    Args:
        W: (out, n); None for a ΔW that does without.
        bias: (out,).
        x: (…, n).
    """
    return _OneProduct.apply(x, W, bias, type(delta), call, input_gradient, *delta)  # type: ignore[no-any-return]


def holds(numbers: Tensor, W: Tensor) -> bool:
    """Say whether the dtype of ΔW's numbers has all values of W's, so that the sum rounds none of W."""
    return torch.promote_types(W.dtype, numbers.dtype) == numbers.dtype


class _OneProduct(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Any, bias: Any, kind: Any, call: Any, input_gradient: Any, *fields: Any
    ) -> Tensor:
        ctx.save_for_backward(x, W, *[f if isinstance(f, Tensor) else None for f in fields])
        ctx.facts = [None if isinstance(f, Tensor) else f for f in fields]
        total = kind(*fields).added(W)
        ctx.options = kind, input_gradient, total.dtype, None if bias is None else bias.dtype
        bias = None if bias is None else bias.to(total.dtype)
        return call(x.to(total.dtype), total, bias).to(x.dtype)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, W, *tensors = ctx.saved_tensors
        kind, input_gradient, dtype, bias_dtype = ctx.options
        delta = kind(*[fact if t is None else t for t, fact in zip(tensors, ctx.facts)])
        need_x, _, need_bias, _, _, _, *need = ctx.needs_input_grad
        rows, flat = (t.reshape(-1, t.shape[-1]).to(dtype) for t in (g, x))
        dx = input_gradient(rows, delta.added(W)).to(x.dtype).view(x.shape) if need_x else None
        dbias = rows.sum(0).to(bias_dtype) if need_bias else None
        own = delta.gradients(rows, flat, need) if any(need) else [None] * len(need)
        return dx, None, dbias, None, None, None, *own


def plain(W: Tensor, bias: Tensor | None, x: Tensor, delta: Tensor) -> Tensor:
    """The reference, with a ΔW that is there. W and delta (out, n), x (…, n), bias (out,) → (…, out)."""
    y = x @ W.T + x @ delta.T
    return y if bias is None else y + bias


class Dense(NamedTuple):
    """A ΔW that is there."""

    delta: Tensor  # (out, n)

    def added(self, W: Tensor) -> Tensor:
        return W + self.delta

    def gradients(self, g: Tensor, x: Tensor, need: Sequence[bool]) -> tuple[Tensor]:
        return (g.T @ x,)


def plain_low_rank(W: Tensor, bias: Tensor | None, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The reference with a `Factored` ΔW: x Wᵀ + s · x Aᵀ Bᵀ + bias."""
    y = x @ W.T + (x @ A.T @ B.T) * scale
    return y if bias is None else y + bias


def low_rank_pays(rows: int, out: int, n: int, r: int, need_A: bool, need_B: bool) -> bool:
    """Say whether forming W + s · B A, once in each direction, costs less in training than products with the factors.

    That is so where r is a good part of n or `out`. `need_…`: the factor gets a gradient, by way of that of W.
    """
    apart = rows * r * ((2 + need_A) * n + (2 + need_B) * out)
    return out * n * ((2 + need_A + need_B) * r + rows) < apart


class Factored(NamedTuple):
    """ΔW = s · B A."""

    A: Tensor  # (r, n)
    B: Tensor  # (out, r)
    scale: float

    def added(self, W: Tensor) -> Tensor:
        return torch.addmm(W, self.B, self.A, alpha=self.scale)

    def gradients(self, g: Tensor, x: Tensor, need: Sequence[bool]) -> tuple[Tensor | None, ...]:
        G = g.T @ x
        dA = (self.B.T @ G) * self.scale if need[0] else None
        dB = (G @ self.A.T) * self.scale if need[1] else None
        return dA, dB, None
