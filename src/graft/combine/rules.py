# SPDX-License-Identifier: Apache-2.0
"""Rules that make one tensor, or one low-rank product, of several. Tensors in, tensors out.

Elementwise rules take tensors of one shape and a weight for each, and return that shape. They prune each tensor first,
then combine. Rules for products B A take A (…, r, n) and B (…, m, r).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graft.core.errors import ConfigError

# elementwise


def linear(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return Σ wᵢ tᵢ. Task arithmetic, arXiv 2212.04089."""
    out = tensors[0] * float(weights[0])
    for t, w in zip(tensors[1:], weights[1:]):
        out.add_(t, alpha=float(w))
    return out


def magnitude_prune(tensors: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Return `linear` of the largest elements of each tensor. Pruning by magnitude, arXiv 1506.02626."""
    return linear([keep_largest(t, density) for t in tensors], weights)


def dare_linear(tensors: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Return `linear` of random elements of each tensor. DARE, arXiv 2311.03099."""
    return linear([drop_and_rescale(t, density) for t in tensors], weights)


def ties(
    tensors: Sequence[Tensor], weights: Sequence[float], density: float, majority_sign_method: str = "total"
) -> Tensor:
    """Return `elect` of the largest elements of each tensor. TIES, arXiv 2306.01708."""
    return elect([keep_largest(t, density) for t in tensors], weights, majority_sign_method)


def dare_ties(
    tensors: Sequence[Tensor], weights: Sequence[float], density: float, majority_sign_method: str = "total"
) -> Tensor:
    """Return `elect` of random elements of each tensor. DARE with TIES, arXiv 2311.03099 and 2306.01708."""
    return elect([drop_and_rescale(t, density) for t in tensors], weights, majority_sign_method)


def keep_largest(t: Tensor, density: float) -> Tensor:
    """Return `t` with all but its ⌊density · n⌋ elements of largest magnitude set to 0."""
    check_density(density)
    if density >= 1:
        return t
    flat = t.flatten()
    kept = flat.abs().topk(int(density * len(flat)), sorted=False).indices
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view(t.shape)


def drop_and_rescale(t: Tensor, density: float) -> Tensor:
    """Keep each element with probability `density` and divide it by that, so that the expectation stays."""
    check_density(density)
    if density >= 1:
        return t
    kept = t * torch.bernoulli(torch.full_like(t, density))
    return kept / density if density else kept


def majority_sign(tensors: Sequence[Tensor], method: str = "total") -> Tensor:
    """Return ±1 by element: the sign of the sum ("total") or of most of them ("frequency"); + in a draw.

    Raises:
        ConfigError: another method.
    """
    if method not in ("total", "frequency"):
        raise ConfigError(f'Unimplemented mask method "{method}": total or frequency.')
    votes = linear(tensors if method == "total" else [t.sign() for t in tensors], [1.0] * len(tensors))
    return votes.sign_().add_(0.5).sign_()


def elect(tensors: Sequence[Tensor], weights: Sequence[float], majority_sign_method: str = "total") -> Tensor:
    """Return Σ wᵢ tᵢ over elements of the majority's sign, divided by their number. Weights do not vote."""
    sign = majority_sign(tensors, majority_sign_method)
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for t, w in zip(tensors, weights):
        agreeing = (t * sign).clamp_(min=0)  # |t| where it agrees
        total.add_(agreeing, alpha=float(w))
        count.add_(agreeing.sign_())
    return total.mul_(sign).div_(count.clamp_(min=1))


def check_density(density: float) -> None:
    """Raise ConfigError for a negative density."""
    if density < 0:
        raise ConfigError(f"Density should be >= 0, got {density}")


# low-rank products


def cat(A: Sequence[Tensor], B: Sequence[Tensor], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return A (…, Σr, n) and B (…, m, Σr) with B A = Σ wᵢ Bᵢ Aᵢ, exactly."""
    return torch.cat([a * float(w) for a, w in zip(A, weights)], dim=-2), torch.cat(list(B), dim=-1)


def truncate_product(A: Tensor, B: Tensor, rank: int, driver: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best approximation of B A of `rank`: Vh (…, rank, n), U S (…, m, rank), and all S (…, k).

    Costs O((m + n) r²): with B = Q_B R_B and Aᵀ = Q_A R_A, an SVD of the r × r matrix R_B R_Aᵀ. `rank` ≤ min(m, n); one
    above r adds orthonormal rows to Vh that belong to singular values of 0.
    """
    more = rank - A.shape[-2]
    if more > 0:
        spare = torch.randn(more, A.shape[-1], generator=torch.Generator("cpu").manual_seed(0), device="cpu")
        A = torch.cat([A, spare.to(A).expand(*A.shape[:-2], -1, -1)], dim=-2)
        B = torch.cat([B, B.new_zeros(*B.shape[:-1], more)], dim=-1)
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False, driver=driver)
    return Vh[..., :rank, :] @ Q_A.mT, Q_B @ (U[..., :rank] * S[..., None, :rank]), S


def truncate_matrix(W: Tensor, rank: int, driver: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same for a matrix (…, m, n) of any rank. Costs O(m n min(m, n)).

    Take an SVD of full size: the spectrum of a pruned matrix has no gap, so that randomised methods
    (torch.svd_lowrank) would miss the last triples.
    """
    U, S, Vh = torch.linalg.svd(W, full_matrices=False, driver=driver)
    return Vh[..., :rank, :].contiguous(), U[..., :rank] * S[..., None, :rank], S


def clamp_to_quantile(A: Tensor, B: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Cut both off at ± that quantile of their values together."""
    most = torch.cat([A.flatten(), B.flatten()]).quantile(quantile)
    return A.clamp(-most, most), B.clamp(-most, most)


def retained_energy(S: Tensor, rank: int) -> float:
    """Return ‖truncated‖² / ‖full‖² from all singular values (…, k), of which `rank` stay; 1 for a matrix of zeros."""
    squares = S.square()
    full = float(squares.sum())
    return float(squares[..., :rank].sum()) / full if full else 1.0
