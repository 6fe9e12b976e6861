# SPDX-License-Identifier: Apache-2.0
"""The difference B A - B₀ A₀ of two products of high rank: added to a weight, or multiplied without being formed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding

from graft.kernels.one_product import Call, InputGradient, holds, linear_with


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
        self, W: Tensor, bias: Tensor | None, x: Tensor, call: Call, input_gradient: InputGradient
    ) -> Tensor | None:
        """Return x (W + ΔW)ᵀ + bias; None if the factors have a narrower dtype than W."""
        return linear_with(W, bias, x, self, call, input_gradient) if holds(self.A, W) else None

    def added(self, W: Tensor) -> Tensor:
        """Return W + ΔW in the dtype of A and the memory layout of W, which may be stored as (in, out)."""
        B, A, B0, A0, shape = self
        if W.T.is_contiguous() and not W.is_contiguous():
            return Difference(A.T, B.T, A0.T, B0.T, shape[::-1]).added(W.T).T
        return torch.addmm(torch.addmm(W.contiguous().to(A.dtype), B, A), B0, A0, alpha=-1)

    def gradients(self, g: Tensor, x: Tensor, need: Sequence[bool]) -> tuple[Tensor | None, ...]:
        G = g.T @ x
        return G @ self.A.T, self.B.T @ G, None, None, None
