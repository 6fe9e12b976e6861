# SPDX-License-Identifier: Apache-2.0
"""LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters, arXiv 2405.17604."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graft.config.fields import LayerRange, Targeted, require_positive_rank
from graft.config.targets import LORA
from graft.core.dropout import dropout_for
from graft.core.effect import Factors
from graft.core.errors import ConfigError
from graft.core.method import Method, Use
from graft.methods.projections import kept


@dataclass(kw_only=True)
class LoraXsConfig(Targeted, LayerRange):
    """LoRA-XS: r × r numbers between the largest singular vectors of the weight, which do not train."""

    peft_type: Any = "LORAXS"
    r: int = 8
    lora_alpha: float = 8  # the update counts alpha / r times
    lora_dropout: float = 0.0
    save_projection: bool = True  # put A and B into files, which then do not depend on the decomposition
    init_weights: bool = True  # R of zeros; False: of the paper's N(0, 1e-5)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_rank(self.r)


class LoraXS(Method):
    """ΔW = s · B R A, with B A the best approximation of W₀ of rank r."""

    config = LoraXsConfig
    prefix = "loraxs_"
    targets = LORA

    loraxs_R: nn.Parameter  # (r, r)
    loraxs_A: Tensor  # (r, fan_in): singular vectors, times their values
    loraxs_B: Tensor  # (out, r): singular vectors
    loraxs_dropout: nn.Module
    scaling: float

    def check(self) -> str | None:
        site, r = self.site, self.cfg.r
        if site.op.known and r > min(site.out_features, site.fan_in):
            raise ConfigError(
                f"LoRA-XS has at most as many singular vectors as the weight of layer '{site.key}', whose shape is "
                f"{tuple(site.shape)}: choose a smaller r than {r}."
            )
        return super().check()

    def uses_weight(self) -> Use:
        return Use.STARTS if self.cfg.save_projection else Use.STARTS | Use.AGAIN

    def build(self, shared: dict[str, Any]) -> dict[str, Any]:
        cfg, site, r = self.cfg, self.site, self.cfg.r
        return dict(
            loraxs_R=nn.Parameter(torch.zeros(r, r)),
            loraxs_A=kept(torch.zeros(r, site.fan_in), cfg.save_projection),
            loraxs_B=kept(torch.zeros(site.out_features, r), cfg.save_projection),
            loraxs_dropout=dropout_for(cfg.lora_dropout),
            scaling=cfg.lora_alpha / r,
            r=r,
        )

    @torch.no_grad()
    def init(self) -> None:
        if not self.cfg.init_weights:
            nn.init.normal_(self.loraxs_R, std=1e-5)
        U, S, V = largest(self.layer.W0.flatten(1), self.cfg.r)
        self.loraxs_A.copy_(S[:, None] * V)
        self.loraxs_B.copy_(U)

    def factors(self) -> Factors:
        return Factors(self.loraxs_A, self.loraxs_B @ self.loraxs_R, self.scaling, self.loraxs_dropout)


def largest(W: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (out, r), S (r,) and V (r, in) of the r largest singular values of W; the largest entry of each column
    of U is positive, so that every decomposition gives the same."""
    U, S, V = torch.linalg.svd(W.to(torch.promote_types(W.dtype, torch.float32)), full_matrices=False)
    U, S, V = U[:, :r], S[:r], V[:r]
    sign = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()  # (1, r)
    return U * sign, S, V * sign.T
