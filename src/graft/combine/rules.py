# SPDX-License-Identifier: Apache-2.0
"""Rules that make one tensor, or one low-rank product, from several; and recipes, which apply them by type of
combination.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from graft.combine.forms import ProductForm, Term
from graft.config.fields import to_int
from graft.core.errors import ConfigError, ConfigTypeError, PeftWarning, warn

# elementwise


def linear(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return Σ wᵢ tᵢ as a new tensor; the inputs stay.

    No tensors raise IndexError. Task arithmetic, arXiv 2212.04089.
    """
    out = tensors[0] * float(weights[0])
    for t, w in zip(tensors[1:], weights[1:]):
        out.add_(t, alpha=float(w))
    return out


def magnitude_prune(tensors: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Return `linear` of the tensors after `keep_largest` of each. Pruning by magnitude, arXiv 1506.02626."""
    return linear([keep_largest(t, density) for t in tensors], weights)


def dare_linear(tensors: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Return `linear` of the tensors after `drop_and_rescale` of each. DARE, arXiv 2311.03099."""
    return linear([drop_and_rescale(t, density) for t in tensors], weights)


def ties(
    tensors: Sequence[Tensor], weights: Sequence[float], density: float, majority_sign_method: str = "total"
) -> Tensor:
    """Return `add_agreeing` of the tensors after `keep_largest` of each. TIES, arXiv 2306.01708."""
    return add_agreeing([keep_largest(t, density) for t in tensors], weights, majority_sign_method)


def dare_ties(
    tensors: Sequence[Tensor], weights: Sequence[float], density: float, majority_sign_method: str = "total"
) -> Tensor:
    """Return `add_agreeing` of the tensors after `drop_and_rescale` of each.

    DARE with TIES, arXiv 2311.03099 and 2306.01708.
    """
    return add_agreeing([drop_and_rescale(t, density) for t in tensors], weights, majority_sign_method)


def keep_largest(t: Tensor, density: float) -> Tensor:
    """Return a new tensor like `t` with all but its ⌊density · n⌋ elements of largest magnitude set to 0; `t` itself if
    density ≥ 1.

    Raises ConfigError for an invalid density.
    """
    check_density(density)
    if density >= 1:
        return t
    flat = t.flatten()
    largest = flat.abs().topk(int(density * len(flat)), sorted=False).indices
    return torch.zeros_like(flat).index_copy_(0, largest, flat[largest]).view(t.shape)


def drop_and_rescale(t: Tensor, density: float) -> Tensor:
    """Return `t` with each element kept with probability `density` and divided by it, else 0; `t` itself if density ≥
    1. Density 0 gives zeros. Draws from torch's global generator. Raises ConfigError for an invalid density.
    """
    check_density(density)
    if density >= 1:
        return t
    out = t * torch.bernoulli(torch.full_like(t, density))
    return out / density if density else out


def majority_sign(tensors: Sequence[Tensor], method: str = "total") -> Tensor:
    """Return ±1 by element in a new tensor: the sign of the sum ("total") or of most elements ("frequency"); +1 in a
    draw.

    Raises:
        ConfigError: another method; it is checked first, also for no tensors.
    """
    if method not in ("total", "frequency"):
        raise ConfigError(f'Unimplemented mask method "{method}". Choose total or frequency.')
    votes = linear(tensors if method == "total" else [t.sign() for t in tensors], [1.0] * len(tensors))
    return votes.sign_().add_(0.5).sign_()


def add_agreeing(tensors: Sequence[Tensor], weights: Sequence[float], majority_sign_method: str = "total") -> Tensor:
    """Return Σ wᵢ tᵢ over elements with the majority's sign, divided by their number, 0 where there are none.

    The inputs stay.

    Weights do not count for the sign. Zeros do not agree. Raises ConfigError for an unknown majority.
    """
    sign = majority_sign(tensors, majority_sign_method)
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for t, w in zip(tensors, weights):
        agreeing = (t * sign).clamp_(min=0)  # |t| where it agrees
        total.add_(agreeing, alpha=float(w))
        count.add_(agreeing.sign_())
    return total.mul_(sign).div_(count.clamp_(min=1))


def check_density(density: float) -> None:
    """Raise ConfigError for a density that is negative, NaN or no number. There is no upper limit."""
    if not isinstance(density, (int, float)) or not density >= 0:
        raise ConfigError(f"Density should be >= 0, got {density}")


# low-rank products


def concatenate_factors(A: Sequence[Tensor], B: Sequence[Tensor], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return A (…, Σr, n) and B (…, m, Σr) with B A = Σ wᵢ Bᵢ Aᵢ, exactly.

    The weights are multiplied into A; B is only joined.
    """
    return torch.cat([a * float(w) for a, w in zip(A, weights)], dim=-2), torch.cat(list(B), dim=-1)


def truncate_product(A: Tensor, B: Tensor, rank: int, driver: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best approximation of B A of `rank`: Vh (…, rank, n), U S (…, m, rank), and all S (…, k).

    Costs O((m + n) r²): with B = Q_B R_B and Aᵀ = Q_A R_A, an SVD of the r × r matrix R_B R_Aᵀ. `rank` ≤ min(m, n). For
    one above r, random rows of a fixed seed are appended to A and zeros to B: Vh gets more orthonormal rows, with
    singular values of 0.
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
    """Return Vh (…, rank, n) and U S (…, m, rank) of a matrix (…, m, n), and all its S. Costs O(m n min(m, n)).

    It takes an SVD of full size: the spectrum of a pruned matrix has no gap, so that randomised methods
    (torch.svd_lowrank) would miss the last triples.
    """
    U, S, Vh = torch.linalg.svd(W, full_matrices=False, driver=driver)
    return Vh[..., :rank, :].contiguous(), U[..., :rank] * S[..., None, :rank], S


def clamp_to_quantile(A: Tensor, B: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Return new A and B with values cut at ± the quantile of all values (not magnitudes) of both."""
    most = torch.cat([A.flatten(), B.flatten()]).quantile(quantile)
    return A.clamp(-most, most), B.clamp(-most, most)


def compute_retained_energy(S: Tensor, rank: int) -> float:
    """Return ‖truncated‖² / ‖full‖² from all singular values (…, k) if the first `rank` are kept; 1 for a matrix of
    zeros.
    """
    squares = S.square()
    full = float(squares.sum())
    return float(squares[..., :rank].sum()) / full if full else 1.0


# rules on tensors with weights and a density, by name
ELEMENTWISE: dict[str, Callable[..., Tensor]] = {
    rule.__name__: rule for rule in (linear, magnitude_prune, dare_linear, dare_ties, ties)
}
PRUNING = [name for name in ELEMENTWISE if name != "linear"]
SVD = ("svd", "exact", *(f"{name}_svd" for name in PRUNING))
TYPES = (*ELEMENTWISE, "cat", *SVD)


@dataclass
class Recipe:
    """How the terms of a layer become one product.

    Attributes:
        kind: the type of combination, such as "ties_svd".
        rank, clamp, driver: of the SVD; None: the default.
        density: the part that pruning keeps.
        majority: the way of TIES to find signs.
    """

    kind: str
    rank: int | None
    clamp: float | None
    driver: str | None
    density: float | None
    majority: str

    @property
    def rule(self) -> Callable[[Sequence[Tensor], Sequence[float]], Tensor]:
        """The elementwise rule of this type, without "_svd".

        `density` is filled in except for "linear", the majority for both types with "ties". Types without such a rule
        ("cat", "svd", "exact") raise KeyError.
        """
        name = self.kind.removesuffix("_svd")
        options: dict[str, object] = {} if name == "linear" else {"density": self.density}
        if name.endswith("ties"):
            options["majority_sign_method"] = self.majority
        return partial(ELEMENTWISE[name], **options)

    @property
    def is_random(self) -> bool:
        """Return True if the type's name begins with "dare": it prunes at random."""
        return self.kind.startswith("dare")

    def check(self, form: ProductForm[Any], peft_type: str) -> None:
        """Check the options for a form, in the order below.

        Warn if a density of 1 or more prunes nothing. At the end a PeftWarning names options that this type ignores:
        `density` of types that do not prune, `svd_rank`, `svd_clamp` and `svd_driver` of types without SVD.

        Raises:
            ConfigError: unknown type.
            NotImplementedError: the type acts on factors, and the form has none.
            ConfigTypeError: a pruning type has no density; an invalid one is a ConfigError.
            ConfigError: for every type, a rank that is below 1 or no integer, then a clamp outside [0, 1], then an
                unknown majority.
        """
        if self.kind not in TYPES:
            raise ConfigError(f"Invalid combination_type: {self.kind}. Known ones: {', '.join(TYPES)}.")
        if self.kind in ELEMENTWISE and not form.takes_factors:
            raise NotImplementedError(
                f"combination_type='{self.kind}' acts on LoRA's factors separately, which {peft_type} adapters do not "
                "have. Use cat, svd or exact."
            )
        pruning = self.kind.removesuffix("_svd") in PRUNING
        if pruning:
            if self.density is None:
                text = f"combination_type='{self.kind}' needs a `density`, the part of the values to keep."
                raise ConfigTypeError(text)
            check_density(self.density)
            if self.density >= 1:
                warn(f"The density {self.density} is greater than or equal to 1, no pruning will be performed.")
        if self.rank is not None and to_int(self.rank, "svd_rank") < 1:
            raise ConfigError(f"`svd_rank` should be a positive integer value but the value passed is {self.rank}")
        if self.clamp is not None and not (isinstance(self.clamp, (int, float)) and 0 <= self.clamp <= 1):
            raise ConfigError(f"`svd_clamp` is a quantile, between 0 and 1, got {self.clamp}.")
        if self.majority not in ("total", "frequency"):
            majority_sign((), self.majority)
        idle = [] if pruning or self.density is None else ["density"]
        if self.kind not in SVD:
            idle += [f"svd_{name}" for name in ("rank", "clamp", "driver") if getattr(self, name) is not None]
        if idle:
            text = f"combination_type='{self.kind}' has no use for {', '.join(idle)}: ignored."
            warn(text, PeftWarning)

    def ranks(self, terms: dict[str, list[Term]]) -> dict[str, int]:
        """Return the rank of the new adapter on each layer, by the layer's key.

        An elementwise type has the rank of its terms. "cat" has their sum, without limit. "exact" without `rank` has
        the sum, at most the layer's highest. Any other has `rank`, or else the highest rank of a term on any layer,
        again at most the layer's highest.

        Raises:
            ConfigError: an elementwise type has terms of different ranks on a layer; or, in the last case, a layer has
                groups that do not divide the rank.
        """
        if self.kind in ELEMENTWISE:
            for key, ts in terms.items():
                if len({t.rank for t in ts}) > 1:
                    raise ConfigError(
                        "All adapters must have the same r value when using combination_type linear, ties, dare_ties "
                        f"or dare_linear. On layer '{key}' they have {[t.rank for t in ts]}. Use cat, svd or exact."
                    )
            return {key: ts[0].rank for key, ts in terms.items()}
        sums = {key: sum(t.rank for t in ts) for key, ts in terms.items()}
        if self.kind == "cat":
            return sums
        if self.rank is None and self.kind == "exact":
            return {key: min(r, terms[key][0].highest) for key, r in sums.items()}
        rank = self.rank or max(t.rank for ts in terms.values() for t in ts)
        ranks = {}
        for key, ts in terms.items():
            groups = ts[0].groups
            if rank % groups:
                raise ConfigError(f"Layer '{key}' has {groups} groups, and {rank} is no multiple. Change svd_rank.")
            ranks[key] = min(rank, ts[0].highest)
        return ranks

    def combine(self, terms: list[Term], rank: int) -> tuple[Tensor, Tensor, float | None]:
        """Return A, B and the retained energy (share of the squared singular values).

        A and B have the order of values, not the shape, of an adapter's. Weights are multiplied by the terms' scaling.

        Elementwise types apply the rule to A and B separately, each with the root of the weight, its sign on A; their
        energy is None. "cat", "svd" and "exact" concatenate the factors. "cat", and "exact" at full rank without clamp,
        return these with energy 1.0. The others apply the rule to dense updates, with weights without the scaling,
        which the updates have; a layer that stores (in, out) has its updates pruned in that order. All remaining
        products are truncated by SVD to `rank`; then `clamp` cuts values at a quantile.
        """
        scaled, stack = [t.weight * t.scaling for t in terms], terms[0].stack
        if self.kind in ELEMENTWISE:
            roots = [math.sqrt(abs(w)) for w in scaled]
            A = self.rule([t.A for t in terms], [math.copysign(r, w) for r, w in zip(roots, scaled)])
            return A, self.rule([t.B for t in terms], roots), None
        pairs = [t.product() for t in terms]
        if self.kind in ("cat", "svd", "exact"):
            A, B = concatenate_factors([a for a, _ in pairs], [b for _, b in pairs], scaled)
            whole = self.kind == "exact" and rank * stack == A.shape[0] * A.shape[1] and self.clamp is None
            if self.kind == "cat" or whole:
                return A, B, 1.0
            A, B, S = truncate_product(A, B, rank * stack // len(A), self.driver)
        else:
            updates = [(b @ a) * t.scaling for (a, b), t in zip(pairs, terms)]
            matrices = [W.mT.contiguous() if terms[0].transposed else W for W in updates]
            W = self.rule(matrices, [t.weight for t in terms])
            W = W.mT if terms[0].transposed else W
            A, B, S = truncate_matrix(W, rank * stack // len(W), self.driver)
        energy = compute_retained_energy(S, A.shape[-2])
        if self.clamp is not None:
            A, B = clamp_to_quantile(A, B, self.clamp)
        return A, B, energy
