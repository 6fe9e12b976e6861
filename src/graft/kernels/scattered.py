# SPDX-License-Identifier: Apache-2.0
"""A matrix of few numbers at given places, the others zero: added to a weight, or multiplied without being formed."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding

from graft.kernels import sparse
from graft.kernels.one_product import Call, InputGradient, holds, linear_with

SPARSE = 0.12  # share of numbers up to which products of these alone beat the full product on a CPU


def plain(W: Tensor, bias: Tensor | None, x: Tensor, values: Tensor, places: Tensor) -> Tensor:
    """The reference: x (W + ΔW)ᵀ + bias. W (out, n), x (…, n), places (k,) into W as a flat list → (…, out)."""
    delta = torch.zeros(W.shape, dtype=values.dtype, device=W.device)
    y = x @ W.T + x @ delta.view(-1).index_add(0, places, values).view(W.shape).T
    return y if bias is None else y + bias


class Scattered(NamedTuple):
    """ΔW of some values, not formed yet. Values at one place add up."""

    values: Tensor  # (k,)
    places: Tensor  # (k,) long: indices into ΔW as a flat list, row by row
    shape: tuple[int, ...]  # of ΔW, (out, in, *kernel)

    def dense(self) -> Tensor:
        return self.values.new_zeros(prod(self.shape)).index_add(0, self.places, self.values).view(self.shape)

    def columns(self, ids: Tensor) -> Tensor:
        """Return the columns of ΔW that `ids` (…) name: (…, out)."""
        return embedding(ids, self.dense().T)

    def product(self, x: Tensor) -> Tensor | None:
        """Return x ΔWᵀ, (…, out); None if x has so many rows that ΔW is smaller than what this would form."""
        out, n = self.shape
        if x.numel() // n * len(self.values) > out * n:
            return None
        parts = x.index_select(-1, self.places % n) * self.values  # (…, k)
        return x.new_zeros(*x.shape[:-1], out).index_add(-1, self.places // n, parts)

    def linear_with(
        self, W: Tensor, bias: Tensor | None, x: Tensor, call: Call, input_gradient: InputGradient
    ) -> Tensor | None:
        """Return x (W + ΔW)ᵀ + bias; None if the values have a narrower dtype than W."""
        return linear_with(W, bias, x, self, call, input_gradient) if holds(self.values, W) else None

    def added(self, W: Tensor) -> Tensor:
        """Return W + ΔW in the dtype of the values and the memory layout of W, which may be stored as (in, out)."""
        values, places, _ = self
        if torch.is_grad_enabled():  # for a second derivative
            return W + values.new_zeros(W.numel()).index_add(0, places, values).view(W.shape)
        n, stored = W.shape[1], W if W.is_contiguous() else W.T
        if stored is not W:
            places = places % n * len(W) + places // n
        made = stored.to(values.dtype, copy=True).contiguous()
        made.view(-1).index_add_(0, places, values)
        return made if stored is W else made.T

    def gradients(self, g: Tensor, x: Tensor, need: Sequence[bool]) -> tuple[Tensor | None, ...]:
        return entries(g, x, self.places), None, None


def entries(g: Tensor, x: Tensor, places: Tensor) -> Tensor:
    """Return gᵀ x at `places`. g (rows, out), x (rows, n), places (k,)."""
    size = g.shape[1] * x.shape[1]
    if torch.is_grad_enabled() or len(places) > SPARSE * size or not sparse.gathers(x):
        return (g.T @ x).reshape(-1).index_select(0, places)
    order = places.argsort()
    found = sparse.entries(g.T.contiguous(), x, places[order])
    return torch.empty_like(found).index_copy_(0, order, found)
