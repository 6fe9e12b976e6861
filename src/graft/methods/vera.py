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
            warn_unsaved("vera_A and vera_B")


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
    def share(
        cls, sites: Sequence[Site], cfg: VeraConfig, existing: dict[str, Any], others: dict[str, Any]
    ) -> dict[str, Any]:
        return projections(cls, ("vera_A", "vera_B"), cfg.r, sites, cfg, existing, others)

    def build(self, shared: dict[str, Any]) -> dict[str, Any]:
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
        d, b = self.vera_lambda_d, self.vera_lambda_b
        A, B = A.to(d.dtype), B.to(d.dtype)  # FSDP casts parameters for a call, and leaves buffers as they are
        return Factors(A, B, dropout=self.vera_dropout, inner=d, outer=b)


def check_alike(method: type[Method], cfg: Any, others: dict[str, Any], fields: Sequence[str]) -> None:
    """Raise ConfigError if an adapter that shares its projections with others differs from them in one of `fields`."""
    for name, other in others.items():
        for field in fields:
            if getattr(other, field) != getattr(cfg, field):
                raise ConfigError(
                    f"{method.__name__} projections are shared: they must be saved for all adapters or none, and drawn "
                    f"alike. {field} is {getattr(cfg, field)}, but adapter '{name}' has {getattr(other, field)}."
                )


def check_wide(name: str, size: int, needed: int) -> None:
    """Raise ConfigError if projections that an earlier adapter has drawn are too small for this one."""
    if size < needed:
        raise ConfigError(
            f"{name} has a size of {size} but {needed} or greater is required; add the adapter with the widest layers "
            "first."
        )


def projections(
    method: type[Method], names: tuple[str, str], rows: int, sites: Sequence[Site], cfg: Any, existing: dict[str, Any],
    others: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Draw A (rows, widest in), then B (widest out, r), from one generator; or take those of the other adapters."""
    check_alike(method, cfg, others, ("projection_prng_key", "save_projection", "r"))
    wide_out, wide_in = max(s.out_features for s in sites), max(s.fan_in for s in sites)
    if existing and others:
        A, B = (existing[name][next(iter(others))] for name in names)
        check_wide(names[0], A.shape[1], wide_in)
        check_wide(names[1], B.shape[0], wide_out)
    else:
        generator = torch.Generator("cpu").manual_seed(cfg.projection_prng_key)
        A, B = torch.empty(rows, wide_in), torch.empty(wide_out, cfg.r)
        for matrix in (A, B):  # kaiming uniform: the bound follows from the number of inputs
            bound = math.sqrt(6 / matrix.shape[1])
            if not matrix.is_meta:
                matrix.uniform_(-bound, bound, generator=generator)
    keep = (lambda t: t) if cfg.save_projection else Transient
    return {names[0]: keep(A), names[1]: keep(B)}


def warn_unsaved(names: str) -> None:
    warn(
        f"Specified to not save {names}: they are drawn again from `projection_prng_key` on load, which gives the same "
        "values only if torch's generator is the same."
    )
