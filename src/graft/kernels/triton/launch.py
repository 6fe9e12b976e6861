# SPDX-License-Identifier: Apache-2.0
"""The start of a kernel: sizes of tiles, the grid, the device."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graft.kernels.triton import tiles

LEAST, MOST = 16, 64  # sides of a tile: the least for tensor cores, the most with room for float32


class Segments(NamedTuple):
    """A batch grouped by adapter."""

    order: Tensor  # samples, adapter by adapter
    tokens: int  # rows of a sample
    table: Tensor  # (adapters, 8): where each one's rows begin and end, and its factor
    longest: int  # rows of the longest segment


def product(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    scale: float = 1.0,
    add: bool = False,
    drop: str = "",
    p: float = 0.0,
    seed: int = 0,
    mixed: str = "",
    segments: Segments | None = None,
) -> Tensor:
    """Write scale · drop(a bᵀ) to `out`, or add it, and return `out`. a (M, K), b (N, K), out (M, N).

    drop: "a" or "out", on which dropout acts; mixed: "a" or "out", which is in the order of the batch. With `segments`,
    b is the largest of the factors.
    """
    M, (N, K) = segments.longest if segments else len(a), b.shape
    BM, BN, BK = side(M), side(N), side(K)
    options = dict(MIXED=mixed, DROP=drop if p else "", ADD=add, BM=BM, BN=BN, BK=BK)
    strides = *a.stride(), *b.stride(), *out.stride()
    _start(
        tiles.product, (-(-M // BM), -(-N // BN)), segments, (a, b, out), (M, N, K, scale, p, seed, *strides), options
    )
    return out


def outer(
    h: Tensor,
    x: Tensor,
    out: Tensor,
    scale: float = 1.0,
    p: float = 0.0,
    seed: int = 0,
    segments: Segments | None = None,
) -> Tensor:
    """Write scale · hᵀ drop(x) to `out` and return it. h (M, R), x (M, N), out (R, N), with `segments` one for each."""
    M, R, N = segments.longest if segments else len(h), h.shape[1], x.shape[1]
    BM, BR, BN = side(M), side(R), side(N)
    options = dict(MIXED=segments is not None, DROP=p > 0, BM=BM, BR=BR, BN=BN)
    strides = *h.stride(), *x.stride(), *((0,) if out.dim() == 2 else ()), *out.stride()
    _start(tiles.outer, (-(-N // BN), -(-R // BR)), segments, (h, x, out), (M, R, N, scale, p, seed, *strides), options)
    return out


def side(size: int) -> int:
    """Return the power of two that covers `size`, within the limits."""
    return min(max(1 << (size - 1).bit_length(), LEAST), MOST)


def _start(
    kernel: Any, grid: tuple, segments: Segments | None, tensors: tuple, numbers: tuple, options: dict[str, Any]
) -> None:
    M, N, K, scale, p, *rest = numbers
    order, tokens, table, _ = segments or (None, 1, None, 0)
    count = 1 if table is None else len(table)
    if 0 in grid:
        return
    exact = torch.get_float32_matmul_precision() == "highest"
    device = tensors[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(*grid, count)](
            *tensors, table, order, tokens, M, N, K, scale / (1 - p), p, *rest, **options,
            PRECISION="ieee" if exact else "tf32", num_warps=4, num_stages=2,
        )  # fmt: skip
