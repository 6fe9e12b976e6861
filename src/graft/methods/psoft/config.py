# SPDX-License-Identifier: Apache-2.0
"""The config of PSOFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from graft.config.fields import LayerRange, Targeted, require_positive_rank
from graft.core.errors import ConfigError, warn

MOST_TERMS = 1000  # of the Cayley-Neumann series


@dataclass(kw_only=True)
class PsoftConfig(Targeted, LayerRange):
    """PSOFT: rotation and scaling within the space of the weight's r largest singular components."""

    peft_type: Any = "PSOFT"
    r: int = 32
    psoft_alpha: int = 32  # the update counts alpha / r times
    psoft_dropout: float = 0.0
    fan_in_fan_out: bool = False  # the layers store (in, out); corrected by layer type
    ab_svd_init: Literal["psoft_init", "pissa_init"] = "psoft_init"  # singular values stand in B, or in A and B
    psoft_svd: Literal["full", "lowrank"] = "full"
    psoft_svd_lowrank_niter: int = 10
    random_seed: int = 0  # of "lowrank"
    psoft_orth: bool = True  # R is orthogonal; else any matrix
    psoft_mag_b: bool = True  # a factor per row of R
    psoft_mag_a: bool = True  # a factor per column of R
    use_cayley_neumann: bool = False  # a power series in place of the exact Cayley transform
    num_cayley_neumann_terms: int = 5
    cayley_neumann_eps: float | None = None  # in (0, 1): the largest Frobenius norm of Q
    init_weights: bool = True  # the identity; else random

    counters: ClassVar[tuple[str, ...]] = ("random_seed",)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_rank(self.r)
        eps, terms = self.cayley_neumann_eps, self.num_cayley_neumann_terms
        niter = self.psoft_svd_lowrank_niter
        for name, given, condition, met in (
            ("cayley_neumann_eps", eps is not None, "use_cayley_neumann=True", self.use_cayley_neumann),
            ("num_cayley_neumann_terms", terms != 5, "use_cayley_neumann=True", self.use_cayley_neumann),
            ("psoft_svd_lowrank_niter", niter != 10, "psoft_svd='lowrank'", self.psoft_svd == "lowrank"),
        ):
            if given and not met:
                warn(f"`{name}` is only used when `{condition}`. It has no effect here.")
        if eps is not None and not 0 < eps < 1:
            raise ConfigError(f"`cayley_neumann_eps` must be in (0, 1) when set; got {eps}.")
        if not 1 <= terms <= MOST_TERMS:
            raise ConfigError(
                f"`num_cayley_neumann_terms` must be a positive integer, at most {MOST_TERMS}; got {terms}."
            )
        if self.psoft_alpha == 0:
            raise ConfigError("`psoft_alpha` must not be 0: B holds the singular values divided by alpha / r.")
