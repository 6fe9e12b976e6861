# SPDX-License-Identifier: Apache-2.0
"""Products with repetitive matrices, without these matrices: a sum of shards of the input, a repeated output."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Shards(NamedTuple):
    """x ↦ (x₀ + x_r + x_2r + …, x₁ + x_r+1 + …, …): the product with identity matrices side by side."""

    r: int
    fan_in: int
    like: Tensor  # has the dtype and device that `weight` gets

    def __call__(self, x: Tensor) -> Tensor:
        """Map (…, fan_in) to (…, r)."""
        whole = self.fan_in - self.fan_in % self.r
        z = x[..., :whole].unflatten(-1, (-1, self.r)).sum(-2)
        return z if whole == self.fan_in else z + nn.functional.pad(x[..., whole:], (0, self.r - self.fan_in + whole))

    @property
    def weight(self) -> Tensor:
        """The matrix of zeros and ones, (r, fan_in)."""
        eye = torch.eye(self.r, dtype=self.like.dtype, device=self.like.device)
        return eye.repeat(1, -(-self.fan_in // self.r))[:, : self.fan_in]


class Repeated(NamedTuple):
    """z ↦ z [D D …]."""

    D: Tensor  # (r, out / times)
    times: int

    def __call__(self, z: Tensor) -> Tensor:
        """Map (…, r) to (…, out)."""
        y = z @ self.D
        return y if self.times == 1 else y.repeat(*[1] * (y.dim() - 1), self.times)

    @property
    def weight(self) -> Tensor:
        """The matrix [D D …]ᵀ, (out, r)."""
        return (self.D if self.times == 1 else self.D.repeat(1, self.times)).T
