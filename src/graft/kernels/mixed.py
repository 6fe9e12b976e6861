# SPDX-License-Identifier: Apache-2.0
"""Low-rank updates for batches with rows of different adapters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from graft.kernels.low_rank import down, down_each
from graft.kernels.waits import vector

STACKED = 2**20  # numbers in the stacked factors: copying more is slower than a loop over the adapters

Factors = Sequence[tuple[Tensor, Tensor, float]]  # A (r, in), B (out, r), scaling


def can_add_groups(factors: Factors, sizes: Sequence[int]) -> bool:
    """Return True if `add_groups` takes these factors.

    All must have one dtype. Where autograd records they must also have one shape, equal numbers of rows, and at most
    `STACKED` numbers together.
    """
    A = factors[0][0]
    if any(a.dtype != A.dtype or b.dtype != A.dtype for a, b, _ in factors):
        return False
    return not torch.is_grad_enabled() or (_have_one_shape(factors, sizes) and _is_cheap_to_stack(factors))


def add_groups(
    y: Tensor, x: Tensor, factors: Factors, order: Tensor, sizes: Sequence[int], in_order: bool = False
) -> Tensor:
    """Add s · x Aᵀ Bᵀ to the rows of each (A, B, s) in y's memory, and return y.

    `can_add_groups` must accept the factors. Rows are picked by `order` and cast to the factors' dtype.

    Adapters of one shape and equal numbers of rows share one batched product, if the rows are in order or stacking is
    cheap; else a loop runs over the adapters. Without gradients and in one dtype, each product adds itself to y. Sums
    in another dtype than y's are rounded once.

    in_order: `order` counts all rows from the first to the last.
    """
    groups = (x if in_order else x.index_select(0, order)).to(factors[0][0].dtype)
    if _have_one_shape(factors, sizes) and (in_order or _is_cheap_to_stack(factors)):
        return _add_stacked(y, groups, factors, None if in_order else order)
    counts = [size * (groups[0].numel() // x.shape[-1]) for size in sizes]
    parts, linear = groups.flatten(0, -2).split(counts), nn.functional.linear
    if y.dtype == groups.dtype and not torch.is_grad_enabled():
        into = y if in_order else y.index_select(0, order)
        for rows, part, (A, B, s) in zip(into.view(-1, y.shape[-1]).split(counts), parts, factors):
            rows.addmm_(down(part, A), B.T, alpha=s)
        return y if in_order else y.index_copy_(0, order, into)
    return _add_rows(y, order, torch.cat([linear(down(part, A) * s, B) for part, (A, B, s) in zip(parts, factors)]))


def _have_one_shape(factors: Factors, sizes: Sequence[int]) -> bool:
    """Return True if all adapters have an A of one shape and equally many rows, so that one batched product serves
    them. The shapes of B are not compared.
    """
    first = factors[0][0]
    return len(set(sizes)) == 1 and all(A.shape == first.shape for A, _, _ in factors)


def _is_cheap_to_stack(factors: Factors) -> bool:
    """Return True if the stacked factors have at most `STACKED` numbers, taking the first adapter's size for all."""
    A, B, _ = factors[0]
    return len(factors) * (A.numel() + B.numel()) <= STACKED


def _add_stacked(y: Tensor, groups: Tensor, factors: Factors, order: Tensor | None) -> Tensor:
    """Add all updates to y by one batched product of stacked factors, in y's memory, and return y.

    Without gradients, with rows in order and one dtype, the product adds itself to y. A common scaling that is a plain
    number then gives the bits of one adapter's product. Otherwise the scalings multiply x Aᵀ first; in other dtypes,
    with gradients or with `order`, `_add_rows` adds the product to y.

    order: None if y's rows are in order.
    """
    A, B = torch.stack([A for A, _, _ in factors]), torch.stack([B for _, B, _ in factors])
    h = down_each(groups.reshape(len(factors), -1, groups.shape[-1]), A)
    scales = [s for _, _, s in factors]
    one = scales[0] if len(set(scales)) == 1 else None
    in_place = order is None and y.dtype == h.dtype == B.dtype and not torch.is_grad_enabled()
    if in_place and one is not None and not isinstance(one, Tensor):  # has the bits of one adapter's product
        y.view(len(factors), -1, y.shape[-1]).baddbmm_(h, B.mT, alpha=one)
        return y
    h = h * (vector(scales, h)[:, None, None] if one is None else one)
    if in_place:
        y.view(len(factors), -1, y.shape[-1]).baddbmm_(h, B.mT)
        return y
    return _add_rows(y, order, torch.bmm(h, B.mT))


def _add_rows(y: Tensor, order: Tensor | None, added: Tensor) -> Tensor:
    """Add `added` to the rows `order` of y (None: to all), in y's memory; return y.

    If the dtypes differ, the sum is computed in the wider one and rounded once. Rows in `order` must differ.
    """
    if order is None:
        added = added.view(y.shape)
        return y.add_(added) if y.dtype == added.dtype else y.copy_(y + added)
    added = added.view(len(order), *y.shape[1:])
    if y.dtype == added.dtype:
        return y.index_add_(0, order, added)
    return y.index_copy_(0, order, (y.index_select(0, order) + added).to(y.dtype))
