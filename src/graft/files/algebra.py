# SPDX-License-Identifier: Apache-2.0
"""Algebra of low-rank changes by their factors, in float64: ΔW = B A is never formed.

B = Q R and Aᵀ = Q' R' make the singular values of B A those of R R'ᵀ, an r × r matrix: (in + out) r² operations.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np

from graft.files.neutral import LowRank, OtherMethod
from graft.files.tensors import Tensor, make_tensor

NOISE = 1e-6  # of the largest singular value: float32 factors make smaller ones by rounding


class Product(NamedTuple):
    """A matrix B A of low rank: B (out, r), A (r, in)."""

    B: np.ndarray
    A: np.ndarray


@dataclass(frozen=True)
class Svd:
    """A matrix U diag(s) Vt of low rank."""

    U: np.ndarray  # (out, k)
    s: np.ndarray  # (k,), the largest first
    Vt: np.ndarray  # (k, in)

    def rank(self) -> int:
        """Return how many singular values are not rounding."""
        return int((self.s > NOISE * self.s[0]).sum()) if len(self.s) else 0


# from and to the factors of files


def list_delta_products(lora: LowRank) -> list[Product]:
    """Return what LoRA adds to the weight of a module, as the module stores it: one matrix, or one for each expert.

    Of a convolution (out, in · kernel), of an embedding (vocabulary, dim). What an initialisation took out of the base
    counts, DoRA's magnitude does not: see `compute_dora_delta`.
    """
    A, B = read_float64(lora.A), read_float64(lora.B) * lora.scale
    if lora.kind == "experts":
        return [Product(b, a) for b, a in zip(B, A, strict=True)]
    if lora.mid is not None:
        A = contract_tucker_core(lora)
    A, B = (M.reshape(len(M), prod(M.shape[1:])) for M in (A, B))  # of rank 0 as well, which AdaLoRA gives
    groups = len(A) // max(1, B.shape[1])
    if groups > 1:  # a second factor that has groups, as its convolution has
        B = block_diagonal(np.split(B, groups))
    product = Product(A.T, B.T) if lora.kind == "embedding" else Product(B, A)
    if lora.shift is not None:
        taken_A, taken_B = lora.shift
        product = sum_products([product, Product(-read_float64(taken_B), read_float64(taken_A))])
    return [product]


def contract_tucker_core(lora: LowRank) -> np.ndarray:
    """Return A (r, in, *kernel) of a convolution with Tucker's core in it, which becomes one of the whole kernel."""
    assert lora.mid is not None
    return np.einsum("rj...,ji->ri...", read_float64(lora.mid), read_float64(lora.A).reshape(lora.A.shape[:2]))


def read_float64(t: Tensor) -> np.ndarray:
    return t.read().astype("f8")


def block_diagonal(blocks: Sequence[np.ndarray]) -> np.ndarray:
    out = np.zeros((sum(len(b) for b in blocks), sum(b.shape[1] for b in blocks)))
    row = column = 0
    for block in blocks:
        out[row : row + len(block), column : column + block.shape[1]] = block
        row, column = row + len(block), column + block.shape[1]
    return out


def as_low_rank(module: LowRank | OtherMethod) -> LowRank | None:
    """Return LoRA as it is, and AdaLoRA's triplets as LoRA, with A in float32 at least; None for other methods."""
    if isinstance(module, LowRank):
        return module
    if module.method != "ADALORA" or module.scale is None:
        return None
    A = module.tensors["lora_A"]
    scaled = read_float64(A) * read_float64(module.tensors["lora_E"])
    return LowRank(make_tensor(scaled, A.dtype if A.dtype == "F64" else "F32"), module.tensors["lora_B"], module.scale)


def replace_factors(lora: LowRank, svds: Sequence[Svd], rank: int) -> LowRank:
    """Return `lora` with the largest `rank` triplets of an SVD in place of its factors, at its scale.

    √σ stands on both sides. A module that has fewer triplets gets zeros.
    """
    scale = lora.scale or 1.0
    pairs = [split_singular_values(svd, rank) for svd in svds]
    if lora.kind == "experts":
        A, B = np.stack([a for _, a in pairs]), np.stack([b for b, _ in pairs])
    elif lora.kind == "embedding":
        ((right, left),) = pairs
        A, B = right.T, left.T
    else:
        ((B, A),) = pairs
        kernel = lora.A.shape[2:] if lora.mid is None else lora.mid.shape[2:]
        A, B = A.reshape(rank, lora.A.shape[1], *kernel), B.reshape(len(B), rank, *(1 for _ in kernel))
    factors = make_tensor(A, lora.A.dtype), make_tensor(B / scale, lora.B.dtype)
    return LowRank(*factors, scale, lora.kind, lora.magnitude, lora.bias if lora.scale else None)


def split_singular_values(svd: Svd, rank: int) -> Product:
    k = min(rank, len(svd.s))
    root = np.sqrt(svd.s[:k])
    B, A = np.zeros((len(svd.U), rank)), np.zeros((rank, svd.Vt.shape[1]))
    B[:, :k], A[:k] = svd.U[:, :k] * root, root[:, None] * svd.Vt[:k]
    return Product(B, A)


def compute_dora_delta(lora: LowRank, W: np.ndarray) -> np.ndarray:
    """Return all that DoRA changes of a weight W (out, …), as a matrix: m (W + ΔW) / ‖W + ΔW‖ - W by rows.

    Of an embedding (vocabulary, dim) by columns.
    """
    W = W.reshape(len(W), -1).astype("f8")
    ((B, A),) = list_delta_products(lora)
    new = W + B @ A
    assert lora.magnitude is not None
    axis = 0 if lora.kind == "embedding" else 1
    gain = read_float64(lora.magnitude) / np.linalg.norm(new, axis=axis)
    return new * (gain if axis == 0 else gain[:, None]) - W


# one matrix


def compute_svd(product: Product) -> Svd:
    """Return the singular triplets of B A, as many as its factors have columns."""
    Qb, Rb = np.linalg.qr(product.B)
    Qa, Ra = np.linalg.qr(product.A.T)
    U, s, Vt = np.linalg.svd(Rb @ Ra.T)
    k = len(s)
    return Svd(Qb @ U[:, :k], s, Vt[:k] @ Qa.T)


def compute_singular_values(product: Product) -> np.ndarray:
    """Return the singular values of B A, the largest first."""
    return np.linalg.svd(reduce_to_core(product), compute_uv=False)


def frobenius_norm(product: Product) -> float:
    """Return ‖B A‖ (Frobenius)."""
    return float(np.linalg.norm(reduce_to_core(product)))


def reduce_to_core(product: Product) -> np.ndarray:
    """Return R R'ᵀ (r, r), which has the singular values of B A."""
    Rb, Ra = (np.asarray(np.linalg.qr(M, "r")) for M in (product.B, product.A.T))
    return Rb @ Ra.T


def stable_rank(s: np.ndarray) -> float:
    """Return ‖·‖²_F / σ₁²; 0 of a matrix that is 0."""
    return float((s**2).sum() / s[0] ** 2) if len(s) and s[0] > 0 else 0.0


def effective_rank(s: np.ndarray) -> float:
    """Return exp(H(σ / Σσ)), H the entropy (Roy and Vetterli 2007); 0 of a matrix that is 0."""
    p = s[s > 0] / s.sum() if s.sum() > 0 else np.empty(0)
    return float(np.exp(-(p * np.log(p)).sum())) if len(p) else 0.0


def rank_for_energy(s: np.ndarray, energy: float) -> int:
    """Return the smallest k with Σ_{i ≤ k} σ² ≥ energy · Σ σ²."""
    sums = np.cumsum(s**2)
    return int(np.searchsorted(sums, energy * sums[-1] * (1 - 1e-12)) + 1) if len(s) and sums[-1] > 0 else 1


def rank_for_ratio(s: np.ndarray, ratio: float) -> int:
    """Return how many σ are larger than σ₁ / ratio."""
    return max(1, int((s > s[:1] / ratio).sum()))


def energy_share(s: np.ndarray, rank: int) -> float:
    """Return the part of Σ σ² that the first `rank` hold; 1 of a matrix that is 0."""
    whole = float((s**2).sum())
    return float((s[:rank] ** 2).sum()) / whole if whole > 0 else 1.0


# several


def sum_products(parts: Iterable[Product], weights: Iterable[float] | None = None) -> Product:
    """Return a weighted sum, exactly: factors stand side by side, and ranks add up."""
    parts = list(parts)
    weights = [1.0] * len(parts) if weights is None else list(weights)
    B = np.concatenate([w * part.B for w, part in zip(weights, parts, strict=True)], 1)
    return Product(B, np.concatenate([part.A for part in parts]))


def inner_product(a: Product, b: Product) -> float:
    """Return Σ a ⊙ b, the inner product of two matrices."""
    return float(((a.B.T @ b.B) * (a.A @ b.A.T)).sum())


class Difference(NamedTuple):
    """How two changes of one weight differ."""

    cosine: float | None  # None: one of them is 0
    relative: float  # ‖a - b‖ / the larger of ‖a‖ and ‖b‖
    angle: float | None  # degrees: the largest between what they write to, or read from


def compare_deltas(a: Sequence[Product], b: Sequence[Product]) -> Difference:
    """Compare two changes: of each one matrix, or as many as there are experts."""
    size_a, size_b = (np.sqrt(sum(frobenius_norm(p) ** 2 for p in parts)) for parts in (a, b))
    distance = np.sqrt(sum(frobenius_norm(sum_products(pair, (1, -1))) ** 2 for pair in zip(a, b, strict=True)))
    larger = max(size_a, size_b)
    if min(size_a, size_b) == 0:
        return Difference(None, float(distance / larger) if larger else 0.0, None)
    cosine = sum(inner_product(x, y) for x, y in zip(a, b, strict=True)) / (size_a * size_b)
    angles = [largest_principal_angle(x, y) for x, y in zip(a, b, strict=True)]
    known_angles = [angle for angle in angles if angle is not None]
    return Difference(float(np.clip(cosine, -1, 1)), float(distance / larger), max(known_angles, default=None))


def largest_principal_angle(a: Product, b: Product) -> float | None:
    """Return the largest principal angle in degrees between the column spaces of two matrices, or their row spaces."""
    x, y = compute_svd(a), compute_svd(b)
    k, l = x.rank(), y.rank()
    if not k or not l:
        return None
    return max(angle_between_bases(x.U[:, :k], y.U[:, :l]), angle_between_bases(x.Vt[:k].T, y.Vt[:l].T))


def angle_between_bases(P: np.ndarray, Q: np.ndarray) -> float:
    """Return the largest principal angle between two spaces, of orthonormal bases, in degrees.

    Sines tell small angles, cosines large ones. The smaller space may lie in the larger one: then it is 0.
    """
    small, large = (P, Q) if P.shape[1] <= Q.shape[1] else (Q, P)
    inside = large.T @ small
    sine = np.linalg.norm(small - large @ inside, 2)
    cosine = np.linalg.svd(inside, compute_uv=False)[-1]
    return float(np.degrees(np.arctan2(sine, cosine)))


def delta_shape(lora: LowRank) -> tuple[int, int]:
    """Return how many rows and columns the matrix has that a module's change is."""
    if lora.kind == "experts":
        return lora.B.shape[1], lora.A.shape[2]
    kernel = lora.A.shape[2:] if lora.mid is None else lora.mid.shape[2:]
    return lora.B.shape[0], lora.A.shape[1] * prod(kernel)
