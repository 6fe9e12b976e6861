# SPDX-License-Identifier: Apache-2.0
"""The two kernels: tiles of a product along a factor's rows, and of one along the batch.

Both read tensors in their own dtype and strides, multiply in the factors' dtype and sum in float32. In a mixed batch
(SGMV: Punica, arXiv 2310.18547; S-LoRA, arXiv 2311.03285) each segment has its own factor, of its own rank, at an
address in `table`, which holds a line of eight numbers for each (`mixed.py`). h and the like hold one segment after
another; `order` says where their samples, of `tokens` rows each, stand in the batch.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_in_batch(m, stop, order, tokens):
    """Return where rows m of the segments stand in the batch."""
    sample = tl.load(order + m // tokens, mask=m < stop, other=0)
    return sample * tokens + m % tokens


INTERPRETED = tl.constexpr(not isinstance(rows_in_batch, triton.JITFunction))


@triton.jit
def plus_product(total, a, b, PRECISION: tl.constexpr):
    """Return total + a b; a and b have one dtype."""
    if INTERPRETED:  # the interpreter's dot takes the bits of bfloat16 for integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def kept(seed, row, column, width, p):
    """Return a mask of the elements of a (rows, width) matrix that dropout keeps."""
    return tl.rand(seed, row[:, None] * width + column[None, :]) >= p


@triton.jit(do_not_specialize=["M", "tokens", "seed"])  # these change from call to call
def product(
    a,  # (M, K)
    b,  # (N, K); in a mixed batch the largest one
    out,  # (M, N): scale · a bᵀ, or the sum with its values
    table,
    order,
    tokens,
    M,
    N,
    K,
    scale,
    p,
    seed,
    a_m,
    a_k,
    b_n,
    b_k,
    out_m,
    out_n,
    MIXED: tl.constexpr,  # "": one factor for all rows; "a", "out": which of the two holds the rows of the batch
    DROP: tl.constexpr,  # "", "a", "out": where dropout acts; its 1 / (1 - p) is in scale
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN).to(tl.int64)
    if MIXED != "":
        line = table + tl.program_id(2) * 8
        m += tl.load(line)
        M = tl.load(line + 1)
        b = tl.load(line + 2).to(b.dtype)
        N = tl.load(line + 3)
        K = tl.load(line + 4)
        b_n = tl.load(line + 5)
        b_k = tl.load(line + 6)
        scale = tl.load(line + 7).to(tl.int32).to(tl.float32, bitcast=True)
    a_row = m
    out_row = m
    if MIXED == "a":
        a_row = rows_in_batch(m, M, order, tokens)
    if MIXED == "out":
        out_row = rows_in_batch(m, M, order, tokens)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK).to(tl.int64)
        a_tile = tl.load(
            a + a_row[:, None] * a_m + k[None, :] * a_k, mask=(m[:, None] < M) & (k[None, :] < K), other=0.0
        )
        b_tile = tl.load(b + n[None, :] * b_n + k[:, None] * b_k, mask=(n[None, :] < N) & (k[:, None] < K), other=0.0)
        if DROP == "a":
            a_tile = tl.where(kept(seed, m, k, K, p), a_tile, 0.0)
        total = plus_product(total, a_tile.to(b_tile.dtype), b_tile, PRECISION)
    total *= scale
    if DROP == "out":
        total = tl.where(kept(seed, m, n, N, p), total, 0.0)
    place = out + out_row[:, None] * out_m + n[None, :] * out_n
    inside = (m[:, None] < M) & (n[None, :] < N)
    if ADD:
        total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "tokens", "seed"])
def outer(
    h,  # (M, R)
    x,  # (M, N)
    out,  # (R, N), in a mixed batch one per segment: scale · hᵀ drop(x)
    table,
    order,
    tokens,
    M,
    R,
    N,
    scale,
    p,
    seed,
    h_m,
    h_r,
    x_m,
    x_n,
    out_s,
    out_r,
    out_n,
    MIXED: tl.constexpr,
    DROP: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
):
    n = tl.program_id(0) * BN + tl.arange(0, BN).to(tl.int64)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    first = 0
    if MIXED:
        line = table + tl.program_id(2) * 8
        first = tl.load(line)
        M = tl.load(line + 1)
        out += tl.program_id(2).to(tl.int64) * out_s
    total = tl.zeros((BR, BN), tl.float32)
    for start in range(first, M, BM):
        m = start + tl.arange(0, BM).to(tl.int64)
        row = m
        if MIXED:
            row = rows_in_batch(m, M, order, tokens)
        h_tile = tl.load(h + m[None, :] * h_m + r[:, None] * h_r, mask=(m[None, :] < M) & (r[:, None] < R), other=0.0)
        x_tile = tl.load(x + row[:, None] * x_m + n[None, :] * x_n, mask=(m[:, None] < M) & (n[None, :] < N), other=0.0)
        if DROP:
            x_tile = tl.where(kept(seed, m, n, N, p), x_tile, 0.0)
        total = plus_product(total, h_tile, x_tile.to(h_tile.dtype), PRECISION)
    total *= scale
    inside = (r[:, None] < R) & (n[None, :] < N)
    tl.store(out + r[:, None] * out_r + n[None, :] * out_n, total.to(out.dtype.element_ty), mask=inside)
