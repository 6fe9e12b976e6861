# SPDX-License-Identifier: Apache-2.0
"""Products with few elements, on a CPU several times faster than full products.

Either only some elements of x (rows, n) take part, at `places`: indices into x as a flat list. Or a matrix has few
numbers at given places, the others zero; it is added to a weight, or multiplied without being formed.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache, partial
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import embedding

from graft.kernels.eager import eager, watched
from graft.kernels.one_product import Call, InputGradient, holds, linear_with

SAMPLED = ("cpu", "cuda")  # device types with torch.sparse.sampled_addmm


def gathers(x: Tensor) -> bool:
    """Return True if products of few elements, picked by index, are faster than full ones on the device of x:
    on a CPU.
    """
    return x.device.type == "cpu"


def plain_product_entries(g: Tensor, W: Tensor, places: Tensor) -> Tensor:
    """Return g W at `places` by the full product; the reference, also used on devices without a sampled product."""
    return (g @ W).reshape(-1).index_select(0, places)


def row_starts(places: Tensor, rows: int, n: int) -> Tensor:
    """Return the positions (rows + 1,) in the sorted `places` at which each row of x begins, and the end."""
    return torch.searchsorted(places, torch.arange(0, (rows + 1) * n, n, device=places.device))


def multiply_sampled(x: Tensor, W: Tensor, places: Tensor) -> Tensor:
    """Return the product of x with Wᵀ, (rows, out), in at least float32, with all of x but the elements at `places` as
    zero.

    x (rows, n), W (out, n), places sorted.
    """
    dtype = torch.promote_types(W.dtype, torch.float32)
    values, n = x.reshape(-1).index_select(0, places).to(dtype), x.shape[1]
    first, table = row_starts(places, len(x), n)[:-1], W.T.to(dtype).contiguous()
    return F.embedding_bag(places % n, table, first, mode="sum", per_sample_weights=values)


@cache
def silence_beta_warning() -> None:
    """Make one sparse tensor with warnings off, so that torch's only warning of their beta state is lost.

    Later calls do nothing.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        of = partial(torch.tensor, device="cpu")
        torch.sparse_csr_tensor(of([0, 1]), of([0]), of([1.0]), (1, 1))


def product_entries(g: Tensor, W: Tensor, places: Tensor) -> Tensor:
    """Return g W at `places` only, (places,), in at least float32. g (rows, out), W (out, n), places sorted.

    Devices other than CPU and CUDA compute the full product.
    """
    dtype = torch.promote_types(W.dtype, torch.float32)
    if g.device.type not in SAMPLED:
        return plain_product_entries(g.to(dtype), W.to(dtype), places)
    return torch.sparse.sampled_addmm(
        zero_pattern(places, len(g), W.shape[1], dtype), g.to(dtype), W.to(dtype)
    ).values()


def zero_pattern(places: Tensor, rows: int, n: int, dtype: torch.dtype) -> Tensor:
    """Return a sparse CSR matrix (rows, n) of zeros at `places`, which are sorted. Torch checks nothing.

    Runs `silence_beta_warning` first.
    """
    silence_beta_warning()
    return torch.sparse_csr_tensor(
        row_starts(places, rows, n),
        places % n,
        torch.zeros_like(places, dtype=dtype),
        (rows, n),
        check_invariants=False,
    )


BLOCK = 256  # rows that are transposed at a time, so that they stay in the cache
SPARSE = 0.12  # up to this share of numbers, computing these alone is faster than the full product on a CPU


class Scattered(NamedTuple):
    """ΔW with values at a few places and zeros elsewhere, not formed yet. Values at one place add up."""

    values: Tensor  # (k,)
    places: Tensor  # (k,) long: indices into ΔW as a flat list, row by row
    shape: tuple[int, ...]  # of ΔW, (out, in, *kernel)
    order: Tensor | None = None  # (k,): indices that sort the places, if `find_order` was asked and had some
    orders: list[Tensor] | None = None  # where `find_order` keeps them for the next call; None: nowhere

    def dense(self) -> Tensor:
        """Return ΔW in `shape`, with the values of equal places summed."""
        return self.values.new_zeros(prod(self.shape)).index_add(0, self.places, self.values).view(self.shape)

    def columns(self, ids: Tensor) -> Tensor:
        """Return the columns of ΔW that `ids` (…) name, (…, out), by forming ΔW of two dimensions."""
        return embedding(ids, self.dense().T)

    def product(self, x: Tensor) -> Tensor | None:
        """Return x ΔWᵀ, (…, out), for a ΔW of two dimensions; for many rows None if forming ΔW is faster (`multiply`).

        Few rows are such that the intermediate, a number for each value and row, is not larger than ΔW.
        """
        out, n = self.shape
        if x.numel() // n * len(self.values) > out * n:
            return self.multiply(x)
        parts = x.index_select(-1, self.places % n) * self.values  # (…, k)
        return x.new_zeros(*x.shape[:-1], out).index_add(-1, self.places // n, parts)

    def multiply(self, x: Tensor) -> Tensor | None:
        """Return x ΔWᵀ, (…, out), in the dtype of x, for a ΔW of two dimensions, in blocks of 256 rows.

        Return None if autograd or a tracer records, if more than the share `SPARSE` of ΔW has values, or on another
        device than a CPU.
        """
        out, n = self.shape
        if torch.is_grad_enabled() or len(self.values) > SPARSE * out * n or not (gathers(x) and eager()):
            return None
        values, places = self.values.to(x.dtype), self.places
        if (order := find_order(places) if self.order is None else self.order) is not None:
            values, places = values[order], places[order]
        y, first = x.new_empty(*x.shape[:-1], out), row_starts(places, out, n)[:-1]
        places = places % n
        for some, rows in zip(x.reshape(-1, n).split(BLOCK), y.view(-1, out).split(BLOCK)):
            table = some.T.contiguous()
            rows.copy_(F.embedding_bag(places, table, first, mode="sum", per_sample_weights=values).T)
        return y

    def linear_with(
        self, W: Tensor, bias: Tensor | None, x: Tensor, call: Call, input_gradient: InputGradient
    ) -> Tensor | None:
        """Return x (W + ΔW)ᵀ + bias by one product, with the places sorted once; None if the values' dtype cannot hold
        W's.
        """
        if not holds(self.values, W):
            return None
        return linear_with(W, bias, x, self._replace(order=find_order(self.places, self.orders)), call, input_gradient)

    def add_to(self, W: Tensor) -> Tensor:
        """Return W + ΔW in new memory, in the dtype of the values.

        Where autograd records, as for a second derivative, ΔW is formed and added. Otherwise the values are added to a
        copy of W at their places, in the layout of W, which may be stored as (in, out).
        """
        values, places = self.values, self.places
        if torch.is_grad_enabled():  # for a second derivative
            return W + values.new_zeros(W.numel()).index_add(0, places, values).view(W.shape)
        n, in_memory = W.shape[1], W if W.is_contiguous() else W.T
        if in_memory is not W:
            places = places % n * len(W) + places // n
        total = in_memory.to(values.dtype, copy=True).contiguous()
        total.view(-1).index_add_(0, places, values)
        return total if in_memory is W else total.T

    def gradients(self, g: Tensor, x: Tensor, need: Sequence[bool]) -> tuple[Tensor | None, ...]:
        """Return the gradient of the values, gᵀ x at their places, always; None for the four other fields."""
        return gradient_entries(g, x, self.places, self.order, self.values.dtype), None, None, None, None


def gradient_entries(g: Tensor, x: Tensor, places: Tensor, order: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return gᵀ x at `places`, (k,), in `dtype`, for g (rows, out), x (rows, n) and places (k,) in any order.

    order: the indices that sort the places; None: they are looked for.

    On a CPU, up to the share `SPARSE` of all numbers, they alone are computed, in blocks of 256 rows. Otherwise, and
    for a second derivative, they are picked from the full product.
    """
    size = g.shape[1] * x.shape[1]
    if torch.is_grad_enabled() or len(places) > SPARSE * size or not gathers(x):
        return (g.T @ x).reshape(-1).index_select(0, places).to(dtype)
    order = find_order(places) if order is None else order
    sums = zero_pattern(places if order is None else places[order], g.shape[1], x.shape[1], dtype)
    for some, rows in zip(g.split(BLOCK), x.split(BLOCK)):
        sums = torch.sparse.sampled_addmm(sums, transpose_block(some, dtype), transpose_block(rows, dtype).T)
    values = sums.values()
    return values if order is None else torch.empty_like(values).index_copy_(0, order, values)


def transpose_block(block: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a matrix (rows, n) transposed, contiguous, in `dtype`.

    From bfloat16 to float32 each pair of neighbours in a row is moved as one number, and split afterwards: that takes
    two thirds of the time, since torch transposes numbers of 32 bits several at a time.
    """
    rows, n = block.shape
    pairs = rows and block.is_contiguous() and not (n % 2 or block.storage_offset() % 2)
    if (block.dtype, dtype) != (torch.bfloat16, torch.float32) or not pairs:
        return block.T.contiguous().to(dtype)
    pixel = block.view(dtype).view(1, 1, 1, -1).permute(0, 3, 1, 2)  # its channels are shuffled
    both = torch.channel_shuffle(pixel, rows).view(torch.int32).view(n // 2, rows)
    out = both.new_empty(n, rows)
    torch.bitwise_left_shift(both, 16, out=out[0::2])  # a float32 begins with the 16 bits of a bfloat16
    torch.bitwise_and(both, -(1 << 16), out=out[1::2])
    return out.view(dtype)


def find_order(places: Tensor, orders: list[Tensor] | None = None) -> Tensor | None:
    """Return the indices that sort `places`; None if they are sorted, or on a device where no kernel needs that.

    While a dispatch mode is active, which may give tensors without values, they are sorted in any case.

    orders: the result for as many places before, or []. It is returned again if it sorts these; a new one replaces it.
    """
    if not gathers(places) or (not watched() and is_sorted(places)):
        return None
    if watched() or orders is None:
        return places.argsort()
    if not orders or not is_sorted(places[orders[0]]):
        orders[:] = [places.argsort()]
    return orders[0]


def is_sorted(places: Tensor) -> bool:
    """Return True if no number is followed by a smaller one."""
    return bool((places[1:] >= places[:-1]).all())
