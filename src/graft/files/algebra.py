# SPDX-License-Identifier: Apache-2.0
"""Linear algebra of low-rank updates in float64, computed from their factors: the full matrix ΔW = B A is never built.

QR factorizations B = Q R and Aᵀ = Q' R' reduce the problem: B A has the singular values of the r × r matrix R R'ᵀ. The
cost is (in + out) r² operations.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np

from graft.files.neutral import Kind, LowRank, OtherMethod
from graft.files.tensors import Tensor, make_tensor

NOISE = 1e-6  # relative to the largest singular value: rounding of float32 factors produces smaller ones


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
        """Return the number of singular values above 1e-6 times the largest one; 0 if there are no singular values."""
        return int((self.s > NOISE * self.s[0]).sum()) if len(self.s) else 0


# conversion from and to the factors in files


def list_delta_products(lora: LowRank) -> list[Product]:
    """Return the update ΔW of a module as factor pairs (B, A): one pair, or one pair per expert for kind "experts".

    B contains the scale. A matrix is (out, in), of a convolution (out, in · kernel), of an embedding (vocabulary, dim).
    A Tucker core is multiplied into A. The B of a grouped convolution becomes block-diagonal. If the module has a
    `shift` (PiSSA), the product of the shift is subtracted, which adds to the rank. Unequal numbers of experts in A and
    B are a ValueError. DoRA's magnitude is ignored: see `compute_dora_delta`.
    """
    A, B = read_float64(lora.A), read_float64(lora.B) * lora.scale
    if lora.kind == "experts":
        return [Product(b, a) for b, a in zip(B, A, strict=True)]
    if lora.mid is not None:
        A = contract_tucker_core(lora)
    # reshape(r, -1) would fail for rank 0, which AdaLoRA produces
    A, B = (M.reshape(len(M), prod(M.shape[1:])) for M in (A, B))
    groups = len(A) // max(1, B.shape[1])
    if groups > 1:  # a grouped convolution: B has r / groups columns
        B = block_diagonal(np.split(B, groups))
    product = Product(A.T, B.T) if lora.kind == "embedding" else Product(B, A)
    if lora.shift is not None:
        taken_A, taken_B = lora.shift
        product = sum_products([product, Product(-read_float64(taken_B), read_float64(taken_A))])
    return [product]


def contract_tucker_core(lora: LowRank) -> np.ndarray:
    """Return A (r, in, *kernel) in float64 of a convolution with a Tucker core: the core (r, r, *kernel) times A (r,
    in). The core has to be there.
    """
    assert lora.mid is not None
    return np.einsum("rj...,ji->ri...", read_float64(lora.mid), read_float64(lora.A).reshape(lora.A.shape[:2]))


def read_float64(t: Tensor) -> np.ndarray:
    """Read a tensor from its file and return its values as float64."""
    return t.read().astype("f8")


def block_diagonal(blocks: Sequence[np.ndarray]) -> np.ndarray:
    """Return one float64 matrix with these matrices along its diagonal, from the top left, and zeros elsewhere."""
    out = np.zeros((sum(len(b) for b in blocks), sum(b.shape[1] for b in blocks)))
    row = column = 0
    for block in blocks:
        out[row : row + len(block), column : column + block.shape[1]] = block
        row, column = row + len(block), column + block.shape[1]
    return out


def as_low_rank(module: LowRank | OtherMethod) -> LowRank | None:
    """Return a module as a LowRank: a LowRank unchanged, an AdaLoRA module with its E multiplied into A, other methods
    as None.

    The new A of AdaLoRA is float64 if A was, otherwise float32. AdaLoRA without a scale is None, too.
    """
    if isinstance(module, LowRank):
        return module
    if module.method != "ADALORA" or module.scale is None:
        return None
    A = module.tensors["lora_A"]
    scaled = read_float64(A) * read_float64(module.tensors["lora_E"])
    return LowRank(make_tensor(scaled, A.dtype if A.dtype == "F64" else "F32"), module.tensors["lora_B"], module.scale)


def replace_factors(lora: LowRank, svds: Sequence[Svd], rank: int) -> LowRank:
    """Return a LowRank of rank `rank`.

    Its factors hold the largest `rank` singular triplets of `svds`, √σ on each side.

    `svds` has one entry, or one per expert. Missing triplets are zeros. The dtypes, the kind, the magnitude and the
    scale stay; B is divided by the scale. With a scale of 0 the new scale is 1, and the bias is dropped. The Tucker
    core, alpha and extra tensors are dropped.
    """
    scale = lora.scale or 1.0
    A, B = join_triplets(svds, rank, lora.kind, lora.A.shape[2:] if lora.mid is None else lora.mid.shape[2:])
    factors = make_tensor(A, lora.A.dtype), make_tensor(B / scale, lora.B.dtype)
    return LowRank(*factors, scale, lora.kind, lora.magnitude, lora.bias if lora.scale else None)


def join_triplets(svds: Sequence[Svd], rank: int, kind: Kind, kernel: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return factors (A, B) of the largest `rank` singular triplets, √σ on each side, in the shapes of a LowRank of
    this kind.

    Missing triplets are zeros. `svds` has one entry, or one per expert; `kernel` is that of a convolution, else empty.
    Experts and embeddings ignore it.
    """
    pairs = [split_singular_values(svd, rank) for svd in svds]
    if kind == "experts":
        return np.stack([a for _, a in pairs]), np.stack([b for b, _ in pairs])
    ((B, A),) = pairs
    if kind == "embedding":
        return B.T, A.T
    return A.reshape(rank, -1, *kernel), B.reshape(len(B), rank, *(1 for _ in kernel))


def split_singular_values(svd: Svd, rank: int) -> Product:
    """Return factors B (out, rank) and A (rank, in) of the largest `rank` triplets, with √σ in both.

    Missing triplets are zeros.
    """
    k = min(rank, len(svd.s))
    root = np.sqrt(svd.s[:k])
    B, A = np.zeros((len(svd.U), rank)), np.zeros((rank, svd.Vt.shape[1]))
    B[:, :k], A[:k] = svd.U[:, :k] * root, root[:, None] * svd.Vt[:k]
    return Product(B, A)


def compute_dora_delta(lora: LowRank, W: np.ndarray) -> np.ndarray:
    """Return the whole change by DoRA of a weight W (out, …), as a float64 matrix: m (W + ΔW) / ‖W + ΔW‖ - W.

    Norms are those of rows, and those of columns for an embedding (vocabulary, dim). The module needs a magnitude. A
    norm of 0 is divided by as it is, so that NaN comes out.
    """
    W = W.reshape(len(W), -1).astype("f8")
    ((B, A),) = list_delta_products(lora)
    new = W + B @ A
    assert lora.magnitude is not None
    axis = 0 if lora.kind == "embedding" else 1
    gain = read_float64(lora.magnitude) / np.linalg.norm(new, axis=axis)
    return new * (gain if axis == 0 else gain[:, None]) - W


# a single matrix


def compute_svd(product: Product) -> Svd:
    """Return the SVD of B A as NumPy arrays with min(out, in, r) singular values, the largest first.

    Values of 0 are kept.

    It is computed by NumPy, from QR decompositions of both factors, in their dtype.
    """
    Qb, Rb = np.linalg.qr(product.B)
    Qa, Ra = np.linalg.qr(product.A.T)
    U, s, Vt = np.linalg.svd(Rb @ Ra.T)
    k = len(s)
    return Svd(Qb @ U[:, :k], s, Vt[:k] @ Qa.T)


def compute_singular_values(product: Product) -> np.ndarray:
    """Return the singular values of B A, the largest first: min(out, in, r) of them, zeros included."""
    return np.linalg.svd(reduce_to_core(product), compute_uv=False)


def frobenius_norm(product: Product) -> float:
    """Return the Frobenius norm ‖B A‖, as that of the small matrix of `reduce_to_core`."""
    return float(np.linalg.norm(reduce_to_core(product)))


def reduce_to_core(product: Product) -> np.ndarray:
    """Return R R'ᵀ from the QR factorizations of B and Aᵀ: a small matrix, at most (r, r), with the singular values of
    B A.
    """
    Rb, Ra = (np.asarray(np.linalg.qr(M, "r")) for M in (product.B, product.A.T))
    return Rb @ Ra.T


def stable_rank(s: np.ndarray) -> float:
    """Return ‖·‖²_F / σ₁² for singular values, the largest first; 0 for a zero matrix or no values."""
    return float((s**2).sum() / s[0] ** 2) if len(s) and s[0] > 0 else 0.0


def effective_rank(s: np.ndarray) -> float:
    """Return exp(H(σ / Σσ)), with H the entropy (Roy and Vetterli 2007); 0 for a zero matrix or no values."""
    p = s[s > 0] / s.sum() if s.sum() > 0 else np.empty(0)
    return float(np.exp(-(p * np.log(p)).sum())) if len(p) else 0.0


def rank_for_energy(s: np.ndarray, energy: float) -> int:
    """Return the smallest k with Σ_{i ≤ k} σ² ≥ energy · Σ σ², to a relative 1e-12; 1 for a zero matrix or no
    values.
    """
    sums = np.cumsum(s**2)
    return int(np.searchsorted(sums, energy * sums[-1] * (1 - 1e-12)) + 1) if len(s) and sums[-1] > 0 else 1


def rank_for_ratio(s: np.ndarray, ratio: float) -> int:
    """Return the number of σ above σ₁ / ratio, and at least 1."""
    return max(1, int((s > s[:1] / ratio).sum()))


def energy_share(s: np.ndarray, rank: int) -> float:
    """Return the share of Σ σ² that the first `rank` values have; 1 for a zero matrix or no values."""
    whole = float((s**2).sum())
    return float((s[:rank] ** 2).sum()) / whole if whole > 0 else 1.0


# several matrices


def sum_products(parts: Iterable[Product], weights: Iterable[float] | None = None) -> Product:
    """Return the weighted sum Σ w · B A as one product, exactly: its factors are concatenated, so the ranks add up.

    Without `weights` every weight is 1. The number of weights has to be the number of products.
    """
    parts = list(parts)
    weights = [1.0] * len(parts) if weights is None else list(weights)
    B = np.concatenate([w * part.B for w, part in zip(weights, parts, strict=True)], 1)
    return Product(B, np.concatenate([part.A for part in parts]))


def inner_product(a: Product, b: Product) -> float:
    """Return Σ a ⊙ b, the Frobenius inner product of two matrices, from their factors."""
    return float(((a.B.T @ b.B) * (a.A @ b.A.T)).sum())


class Difference(NamedTuple):
    """The difference of two updates of one weight."""

    cosine: float | None  # None if one of them is 0
    relative: float  # ‖a - b‖ / the larger of ‖a‖ and ‖b‖
    angle: float | None  # degrees; the largest principal angle of column or row spaces


def compare_deltas(a: Sequence[Product], b: Sequence[Product]) -> Difference:
    """Return the difference of two updates, each given as one product or one per expert.

    Norms and the inner product run over all experts; the angle is the largest of the experts' angles. If one update is
    0, `cosine` and `angle` are None. If both are 0, `relative` is 0, too. Raises ValueError if the numbers of products
    differ.
    """
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
    """Return the larger of two principal angles in degrees: between the column spaces, and between the row spaces.

    Spaces are of numerical rank (`Svd.rank`). Returns None if one of the matrices is 0.
    """
    x, y = compute_svd(a), compute_svd(b)
    k, l = x.rank(), y.rank()
    if not k or not l:
        return None
    return max(angle_between_bases(x.U[:, :k], y.U[:, :l]), angle_between_bases(x.Vt[:k].T, y.Vt[:l].T))


def angle_between_bases(P: np.ndarray, Q: np.ndarray) -> float:
    """Return the largest principal angle in degrees between two subspaces, given by matrices with orthonormal columns.

    It is 0 if the smaller subspace lies inside the larger one. Uses atan2 of sine and cosine, which is exact for small
    and for large angles.
    """
    small, large = (P, Q) if P.shape[1] <= Q.shape[1] else (Q, P)
    inside = large.T @ small
    sine = np.linalg.norm(small - large @ inside, 2)
    cosine = np.linalg.svd(inside, compute_uv=False)[-1]
    return float(np.degrees(np.arctan2(sine, cosine)))


def delta_shape(lora: LowRank) -> tuple[int, int]:
    """Return (rows, columns) of a module's update matrix: (out, in); of a convolution (out, in · kernel), the kernel of
    `mid` if it has one; of one expert (out, in).

    For an embedding these are (dim, vocabulary), the transpose of the matrix from `list_delta_products`.
    """
    if lora.kind == "experts":
        return lora.B.shape[1], lora.A.shape[2]
    kernel = lora.A.shape[2:] if lora.mid is None else lora.mid.shape[2:]
    return lora.B.shape[0], lora.A.shape[1] * prod(kernel)
