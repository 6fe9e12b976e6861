# SPDX-License-Identifier: Apache-2.0
"""VeRA: Vector-based Random Matrix Adaptation, arXiv 2310.11454."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graft.config.fields import LayerRange, Targets, require_positive_rank
from graft.config.targets import PHI_ATTENTION
from graft.core.containers import Transient
from graft.core.effect import Factors
from graft.core.errors import ConfigError, warn
from graft.core.method import Method
from graft.core.site import Site


@dataclass(kw_only=True)
class VeraConfig(Targets, LayerRange):
    """VeRA: ΔW = diag(λ_b) B diag(λ_d) A, with random A and B that all layers share and that never train."""

    peft_type: Any = "VERA"
    r: int = 256
    projection_prng_key: int = 0  # seed of A and B
    save_projection: bool = True  # put A and B into files, too, which then do not depend on the generator
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False  # the layers store (in, out); corrected by layer type
    bias: str = "none"  # which base biases train: none, all, vera_only
    init_weights: bool = True

    counters: ClassVar[tuple[str, ...]] = ("projection_prng_key",)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_rank(self.r)
        if not self.save_projection:
            warn(
                "Specified to not save vera_A and vera_B: they are drawn again from `projection_prng_key` on load, "
                "which gives the same values only if torch's generator is the same."
            )


class VeRA(Method):
    """ΔW = diag(λ_b) B diag(λ_d) A. A (r, in) and B (out, r) are parts of matrices that all layers share."""

    config = VeraConfig
    prefix = "vera_lambda_"
    targets = PHI_ATTENTION

    vera_lambda_b: nn.Parameter  # (out,)
    vera_lambda_d: nn.Parameter  # (r,)
    vera_A: Tensor  # (r, widest in), shared
    vera_B: Tensor  # (widest out, r), shared
    vera_dropout: nn.Module

    @classmethod
    def share(cls, sites: Sequence[Site], cfg: VeraConfig, existing, others):
        wide_out, wide_in = max(s.out_features for s in sites), max(s.fan_in for s in sites)
        for name, other in others.items():
            for field in ("projection_prng_key", "save_projection", "r"):
                if getattr(other, field) != getattr(cfg, field):
                    raise ConfigError(
                        "VeRA projections are shared: they must be saved for all adapters or none, and drawn alike. "
                        f"{field} is {getattr(cfg, field)}, but adapter '{name}' has {getattr(other, field)}."
                    )
        if existing and others:
            A, B = (existing[f"vera_{x}"][next(iter(others))] for x in "AB")
            for name, size, needed in (("vera_A", A.shape[1], wide_in), ("vera_B", B.shape[0], wide_out)):
                if size < needed:
                    raise ConfigError(
                        f"{name} has a size of {size} but {needed} or greater is required; add the adapter with the "
                        "widest layers first."
                    )
        else:
            generator = torch.Generator("cpu").manual_seed(cfg.projection_prng_key)
            A, B = torch.empty(cfg.r, wide_in), torch.empty(wide_out, cfg.r)
            for matrix in (A, B):  # kaiming uniform: the bound follows from the number of inputs
                bound = math.sqrt(6 / matrix.shape[1])
                if not matrix.is_meta:
                    matrix.uniform_(-bound, bound, generator=generator)
        keep = (lambda t: t) if cfg.save_projection else Transient
        return dict(vera_A=keep(A), vera_B=keep(B))

    def build(self, shared):
        cfg = self.cfg
        return shared | dict(
            r=cfg.r,
            vera_lambda_b=nn.Parameter(torch.ones(self.site.out_features)),
            vera_lambda_d=nn.Parameter(torch.randn(cfg.r)),
            vera_dropout=nn.Dropout(cfg.vera_dropout) if cfg.vera_dropout > 0 else nn.Identity(),
        )

    def init(self) -> None:
        if self.cfg.init_weights:
            nn.init.constant_(self.vera_lambda_d, self.cfg.d_initial)
            nn.init.zeros_(self.vera_lambda_b)

    def factors(self) -> Factors:
        A, B = self.vera_A[:, : self.site.fan_in], self.vera_B[: self.site.out_features]
        return Factors(A, B, dropout=self.vera_dropout, inner=self.vera_lambda_d, outer=self.vera_lambda_b)
