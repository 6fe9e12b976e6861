# SPDX-License-Identifier: Apache-2.0
"""The matrix W ⊙ (B A) + D C: dense, or within one product, added to a weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding

from graft.kernels.one_product import Call, InputGradient, holds, linear_with


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
        self, W: Tensor, bias: Tensor | None, x: Tensor, call: Call, input_gradient: InputGradient
    ) -> Tensor | None:
        """Return x (W + ΔW)ᵀ + bias; None if the factors have a narrower dtype than W."""
        return linear_with(W, bias, x, self, call, input_gradient) if holds(self.A, W) else None

    def added(self, W: Tensor) -> Tensor:
        """Return W + ΔW in the dtype of the factors."""
        P = product(self.B, self.A, W)
        S = torch.addcmul(W, self.W, P) if W.dtype == P.dtype else (self.W * P).add_(W)
        return S if self.D is None or self.C is None else S.addmm_(self.D, self.C)

    def gradients(self, g: Tensor, x: Tensor, need: Sequence[bool]) -> tuple[Tensor | None, ...]:
        inner = g.T @ x  # of ΔW
        dD = dC = None
        if self.D is not None and self.C is not None and (need[3] or need[4]):
            dD, dC = inner @ self.C.T, self.D.T @ inner
        inner = inner * self.W if torch.is_grad_enabled() else inner.mul_(self.W)  # of B A
        return None, inner @ self.A.T, self.B.T @ inner, dD, dC


def product(B: Tensor, A: Tensor, like: Tensor) -> Tensor:
    """Return B A, (out, n), in the memory layout of `like`, which may be stored as (in, out)."""
    return (A.T @ B.T).T if like.dim() == 2 and not like.is_contiguous() else B @ A
