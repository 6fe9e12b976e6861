# SPDX-License-Identifier: Apache-2.0
"""The matrix a ⊙ W + b 1ᵀ, with a number for each row: dense, or within one product, added to W."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding

from graft.kernels.one_product import Call, InputGradient


def plain(W: Tensor, bias: Tensor | None, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The reference: x (W + a ⊙ W + b 1ᵀ)ᵀ + bias. W (out, n), a and b (out, 1) or (1,), x (…, n) → (…, out)."""
    y = x @ (W + a * W + b).T
    return y if bias is None else y + bias


class Rescaled(NamedTuple):
    """ΔW = a ⊙ W + b 1ᵀ, not formed yet. W gets no gradient."""

    W: Tensor  # (out, in, *kernel)
    a: Tensor | None  # (out, 1) or (1,); None: zero, and b as well
    b: Tensor | None

    def dense(self) -> Tensor:
        if self.a is None or self.b is None:
            return torch.zeros_like(self.W)
        return torch.addcmul(self.b, self.a, self.W.flatten(1)).view(self.W.shape)

    def columns(self, ids: Tensor) -> Tensor:
        """Return the columns of ΔW that `ids` (…) name: (…, out)."""
        own = embedding(ids, self.W.T)
        return torch.zeros_like(own) if self.a is None or self.b is None else own * self.a.flatten() + self.b.flatten()

    def product(self, x: Tensor) -> None:
        """Say that for few rows, too, the matrix has to be formed."""

    def linear_with(
        self, W: Tensor, bias: Tensor | None, x: Tensor, call: Call, input_gradient: InputGradient
    ) -> Tensor | None:
        """Return x (W + ΔW)ᵀ + bias, from x Wᵀ. Return None if W is another weight than that of ΔW.

        input_gradient is unused: nothing here but operations with a backward pass of their own.
        """
        if W.data_ptr() != self.W.data_ptr():
            return None
        if self.a is None or self.b is None:
            return call(x, W, None if bias is None else bias.to(x.dtype))
        y = call(x, W, None) * (1 + self.a.flatten())
        y = y.addcmul_(x.sum(-1, keepdim=True, dtype=y.dtype), self.b.flatten())
        return (y if bias is None else y.add_(bias)).to(x.dtype)
