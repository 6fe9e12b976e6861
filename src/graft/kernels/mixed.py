# SPDX-License-Identifier: Apache-2.0
"""Low-rank updates of a batch whose rows use different adapters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STACKED = 2**20  # numbers in the stacked factors: copying more costs more than a loop over the adapters


def plain(y: Tensor, x: Tensor, factors: Sequence[tuple[Tensor, Tensor, float]], order: Tensor) -> Tensor:
    """The reference: y with s · x Aᵀ Bᵀ added to the rows of each (A, B, s).

    y (batch, …, out), x (batch, …, in); `order`: the rows of the first adapter, as many of the second, ….
    """
    out = y.clone()
    for index, (A, B, s) in zip(order.view(len(factors), -1), factors):
        out[index] += (x[index].to(A.dtype) @ A.T @ B.T * s).to(y.dtype)
    return out


def fits(factors: Sequence[tuple[Tensor, Tensor, float]]) -> bool:
    A, B, _ = factors[0]
    size = len(factors) * (A.numel() + B.numel())
    return size <= STACKED and all(a.shape == A.shape and a.dtype == A.dtype for a, _, _ in factors)


def add_groups(y: Tensor, x: Tensor, factors: Sequence[tuple[Tensor, Tensor, float]], order: Tensor) -> Tensor:
    """As `plain`, in y's memory, by one batched product for all adapters. They must have one rank (`fits`)."""
    A, B = torch.stack([A for A, _, _ in factors]), torch.stack([B for _, B, _ in factors])
    groups = x.index_select(0, order).to(A.dtype).reshape(len(factors), -1, x.shape[-1])
    h = torch.bmm(groups, A.mT)
    scales = [s for _, _, s in factors]
    if len(set(scales)) == 1:
        h = h * scales[0]
    else:
        h = h * torch.tensor(scales, dtype=h.dtype, device=h.device)[:, None, None]
    added = torch.bmm(h, B.mT).to(y.dtype)
    return y.index_add_(0, order, added.view(len(order), *y.shape[1:]))
