# SPDX-License-Identifier: Apache-2.0
"""Products with a matrix of k × k blocks, each of low rank, whose factors share what they read and write.

Block (j, n) of the matrix is (A_n[:, j] B_j[n, :])ᵀ. A_n (in / k, r) maps part n of the input to r numbers, of which
chunk j goes to part j of the output; there B_j (r, out / k) takes the chunks of all n.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


def plain(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The reference. x (…, in), A (k, in / k, r), B (k, r, out / k) → (…, out)."""
    k = len(A)
    rows = []
    for j in range(k):
        blocks = (A[n].chunk(k, 1)[j] @ B[j].chunk(k, 0)[n] for n in range(k))
        rows.append(torch.cat(list(blocks)).T)  # (out / k, in)
    return x @ torch.cat(rows).T


class Inputs(NamedTuple):
    """x ↦ the chunks (j, n) of A_n x_n, then `general` of all of x: (…, in) → (…, k r + s)."""

    A: Tensor  # (k, in / k, r)
    general: Any = None  # a linear layer to s numbers

    def __call__(self, x: Tensor) -> Tensor:
        k, width, r = self.A.shape
        z = torch.bmm(x.reshape(-1, k, width).transpose(0, 1), self.A)  # (n, rows, j · chunk)
        z = z.unflatten(-1, (k, -1)).permute(1, 2, 0, 3).reshape(*x.shape[:-1], k * r)
        return z if self.general is None else torch.cat((z, self.general(x)), -1)

    @property
    def weight(self) -> Tensor:
        """The matrix, (k r + s, in)."""
        k, width, r = self.A.shape
        chunks = self.A.unflatten(-1, (k, -1)).permute(2, 0, 3, 1)  # (j, n, chunk, in / k)
        place = torch.eye(k, dtype=chunks.dtype, device=chunks.device)
        own = (chunks[:, :, :, None] * place[:, None, :, None]).reshape(k * r, k * width)
        return own if self.general is None else torch.cat((own, self.general.weight))


class Outputs(NamedTuple):
    """z ↦ B_j of the chunks (j, n), and `general` of the last s numbers: (…, k r + s) → (…, out)."""

    B: Tensor  # (k, r, out / k)
    general: Any = None  # a linear layer of s numbers

    def __call__(self, z: Tensor) -> Tensor:
        k, r, _ = self.B.shape
        own = z[..., : k * r].reshape(-1, k, r).transpose(0, 1)
        y = torch.bmm(own, self.B).transpose(0, 1).reshape(*z.shape[:-1], -1)
        return y if self.general is None else y + self.general(z[..., k * r :])

    @property
    def weight(self) -> Tensor:
        """The matrix, (out, k r + s)."""
        k, r, width = self.B.shape
        place = torch.eye(k, dtype=self.B.dtype, device=self.B.device)
        own = (self.B.mT[:, :, None] * place[:, None, :, None]).reshape(k * width, k * r)
        return own if self.general is None else torch.cat((own, self.general.weight), 1)
