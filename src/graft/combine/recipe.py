# SPDX-License-Identifier: Apache-2.0
"""Recipes: the types of combination, and how terms of a layer become one product by each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from graft.combine import rules
from graft.combine.forms import Form, Term
from graft.core.errors import ConfigError, ConfigTypeError, PeftWarning, warn

# rules on tensors with weights and a density, by name
ELEMENTWISE: dict[str, Callable[..., Tensor]] = {
    "linear": rules.linear,
    "magnitude_prune": rules.magnitude_prune,
    "dare_linear": rules.dare_linear,
    "dare_ties": rules.dare_ties,
    "ties": rules.ties,
}
PRUNING = [name for name in ELEMENTWISE if name != "linear"]
SVD = ("svd", "exact", *(f"{name}_svd" for name in PRUNING))
TYPES = (*ELEMENTWISE, "cat", *SVD)


@dataclass
class Recipe:
    """The way in which the terms of a layer become one product."""

    kind: str
    rank: int | None
    clamp: float | None
    driver: str | None
    density: float | None
    majority: str

    @property
    def rule(self) -> Callable[[Sequence[Tensor], Sequence[float]], Tensor]:
        name = self.kind.removesuffix("_svd")
        options: dict[str, Any] = {} if name == "linear" else {"density": self.density}
        if name.endswith("ties"):
            options["majority_sign_method"] = self.majority
        return partial(ELEMENTWISE[name], **options)

    @property
    def draws(self) -> bool:
        """Return True if pruning is random."""
        return self.kind.startswith("dare")

    def check(self, form: Form, peft_type: str) -> None:
        if self.kind not in TYPES:
            raise ConfigError(f"Invalid combination_type: {self.kind}. Known ones: {', '.join(TYPES)}.")
        if self.kind in ELEMENTWISE and not form.apart:
            raise NotImplementedError(
                f"combination_type='{self.kind}' acts on the factors of LoRA apart, which means nothing for "
                f"{peft_type} adapters: their sum can be had with cat, svd or exact."
            )
        pruning = self.kind.removesuffix("_svd") in PRUNING
        if pruning and self.density is None:
            raise ConfigTypeError(f"combination_type='{self.kind}' needs a `density`, the part of the values to keep.")
        if pruning and self.density is not None:
            rules.check_density(self.density)
            if self.density >= 1:
                text = f"The density {self.density} is greater than or equal to 1, no pruning will be performed."
                warn(text)
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"`svd_rank` should be a positive integer value but the value passed is {self.rank}")
        if self.clamp is not None and not 0 <= self.clamp <= 1:
            raise ConfigError(f"`svd_clamp` is a quantile, between 0 and 1, got {self.clamp}.")
        if self.majority not in ("total", "frequency"):
            rules.majority_sign((), self.majority)
        idle = [] if pruning or self.density is None else ["density"]
        if self.kind not in SVD:
            idle += [f"svd_{name}" for name in ("rank", "clamp", "driver") if getattr(self, name) is not None]
        if idle:
            text = f"combination_type='{self.kind}' has no use for {', '.join(idle)}: ignored."
            warn(text, PeftWarning)

    def ranks(self, terms: dict[str, list[Term]]) -> dict[str, int]:
        """Return the rank of the new adapter on each layer."""
        if self.kind in ELEMENTWISE:
            for key, ts in terms.items():
                if len({t.rank for t in ts}) > 1:
                    raise ConfigError(
                        "All adapters must have the same r value when using combination_type linear, ties, dare_ties "
                        f"or dare_linear. On layer '{key}' they have {[t.rank for t in ts]}: use cat, svd or exact."
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
                raise ConfigError(
                    f"Layer '{key}' has {groups} groups, by which rank {rank} is not divisible: pass another svd_rank."
                )
            ranks[key] = min(rank, ts[0].highest)
        return ranks

    def combine(self, terms: list[Term], rank: int) -> tuple[Tensor, Tensor, float | None]:
        """Return A, B and the retained energy. A and B have the order of values, not the shape, of an adapter's."""
        scaled, stack = [t.weight * t.scaling for t in terms], terms[0].stack
        if self.kind in ELEMENTWISE:
            roots = [math.sqrt(abs(w)) for w in scaled]
            A = self.rule([t.A for t in terms], [math.copysign(r, w) for r, w in zip(roots, scaled)])
            return A, self.rule([t.B for t in terms], roots), None
        pairs = [t.product() for t in terms]
        if self.kind in ("cat", "svd", "exact"):
            A, B = rules.cat([a for a, _ in pairs], [b for _, b in pairs], scaled)
            whole = self.kind == "exact" and rank * stack == A.shape[0] * A.shape[1] and self.clamp is None
            if self.kind == "cat" or whole:
                return A, B, 1.0
            A, B, S = rules.truncate_product(A, B, rank * stack // len(A), self.driver)
        else:
            updates = [(b @ a) * t.scaling for (a, b), t in zip(pairs, terms)]
            stored = [W.mT.contiguous() if terms[0].transposed else W for W in updates]
            W = self.rule(stored, [t.weight for t in terms])
            W = W.mT if terms[0].transposed else W
            A, B, S = rules.truncate_matrix(W, rank * stack // len(W), self.driver)
        energy = rules.retained_energy(S, A.shape[-2])
        if self.clamp is not None:
            A, B = rules.clamp_to_quantile(A, B, self.clamp)
        return A, B, energy
