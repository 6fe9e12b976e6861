# SPDX-License-Identifier: Apache-2.0
"""The matrix W ⊙ (B A) + D C: dense, or within one product, added to a weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding

from graft.kernels.function import Function


def plain(
    W: Tensor, bias: Tensor | None, x: Tensor, W0: Tensor, B: Tensor, A: Tensor,
    D: Tensor | None = None, C: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The reference: x (W + W0 ⊙ B A + D C)ᵀ + bias. W (out, n), B (out, r), A (r, n), x (…, n) → (…, out)."""
    y = x @ W.T + x @ (W0 * (B @ A)).T
    if D is not None and C is not None:
        y = y + x @ (D @ C).T
    return y if bias is None else y + bias


class Modulated(NamedTuple):
    """ΔW = W ⊙ (B A) + D C, not formed yet. W gets no gradient."""

    W: Tensor  # (out, in, *kernel)
    B: Tensor  # (out, r)
    A: Tensor  # (r, in · kernel)
    D: Tensor | None = None  # (out, r); None: no D C
    C: Tensor | None = None  # (r, in · kernel)

    def dense(self) -> Tensor:
        delta = self.W * product(self.B, self.A, self.W).view(self.W.shape)
        return delta if self.D is None else delta + product(self.D, self.C, self.W).view(self.W.shape)  # type: ignore[arg-type]

    def columns(self, ids: Tensor) -> Tensor:
        """Return the columns of ΔW that `ids` (…) name: (…, out)."""
        own = embedding(ids, self.W.T) * (embedding(ids, self.A.T) @ self.B.T)
        return own if self.D is None else own + embedding(ids, self.C.T) @ self.D.T  # type: ignore[union-attr]

    def product(self, x: Tensor) -> None:
        """Say that for few rows, too, the matrix has to be formed."""

    def linear_with(
        self, W: Tensor, bias: Tensor | None, x: Tensor, call: Callable[..., Tensor],
        input_gradient: Callable[..., Tensor],
    ) -> Tensor | None:  # fmt: skip
        """Return x (W + ΔW)ᵀ + bias; keep x and the factors. Return None if these have a narrower dtype than W.

        W gets no gradient.

        Args:
            call: (x, weight, bias) → the output of a linear layer.
            input_gradient: (gradient of that output (rows, out), weight) → gradient of its input (rows, n).
        """
        if torch.promote_types(W.dtype, self.A.dtype) != self.A.dtype:
            return None
        return _OneProduct.apply(x, W, bias, *self, call, input_gradient)  # type: ignore[no-any-return]


def product(B: Tensor, A: Tensor, like: Tensor) -> Tensor:
    """Return B A, (out, n), in the memory layout of `like`, which may be stored as (in, out)."""
    return (A.T @ B.T).T if like.dim() == 2 and not like.is_contiguous() else B @ A


class _OneProduct(Function):
    """`linear_with`, which computes in the dtype of the factors, rounds the output once, and keeps all as it came."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Any, W0: Tensor, B: Tensor, A: Tensor, D: Any, C: Any,
        call: Any, input_gradient: Any,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, W, W0, B, A, D, C)
        ctx.input_gradient, ctx.bias_dtype = input_gradient, None if bias is None else bias.dtype
        bias = None if bias is None else bias.to(A.dtype)
        return call(x.to(A.dtype), _sum(W, W0, B, A, D, C), bias).to(x.dtype)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        x, W, W0, B, A, D, C = ctx.saved_tensors
        need = ctx.needs_input_grad
        rows, flat = (t.reshape(-1, t.shape[-1]).to(A.dtype) for t in (g, x))
        dx = dbias = dB = dA = dD = dC = None
        if need[0]:
            dx = ctx.input_gradient(rows, _sum(W, W0, B, A, D, C)).to(x.dtype).view(x.shape)
        if need[2]:
            dbias = rows.sum(0).to(ctx.bias_dtype)
        if any(need[4:8]):
            inner = rows.T @ flat  # gradient of ΔW
            if need[6] or need[7]:
                dD, dC = inner @ C.T, D.T @ inner
            inner = inner * W0 if torch.is_grad_enabled() else inner.mul_(W0)  # gradient of B A
            dB, dA = inner @ A.T, B.T @ inner
        return dx, None, dbias, None, dB, dA, dD, dC, None, None


def _sum(W: Tensor, W0: Tensor, B: Tensor, A: Tensor, D: Tensor | None, C: Tensor | None) -> Tensor:
    P = product(B, A, W)
    S = torch.addcmul(W, W0, P) if W.dtype == P.dtype else (W0 * P).add_(W)
    return S if D is None or C is None else S.addmm_(D, C)
