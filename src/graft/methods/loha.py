# SPDX-License-Identifier: Apache-2.0
"""LoHa: low-rank Hadamard product. FedPara, arXiv 2108.06098; LyCORIS, arXiv 2309.14859."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graft.config.fields import LayerRange, RankPatterns, Targeted, require_positive_rank
from graft.config.targets import LORA
from graft.core.effect import Effect, Factors, LowRank, Update
from graft.core.method import Method
from graft.kernels.hadamard import Hadamard, is_narrow, narrow


@dataclass(kw_only=True)
class LoHaConfig(Targeted, LayerRange, RankPatterns):
    """LoHa: ΔW = alpha / r · (w1_a w1_b) ⊙ (w2_a w2_b), of rank up to r²."""

    peft_type: Any = "LOHA"
    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0  # drops output rows of ΔW in training
    module_dropout: float = 0.0  # drops all of ΔW in training
    use_effective_conv2d: bool = False  # factor convolution kernels as well (FedPara, proposition 3)
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_rank(self.r)


class LoHa(Method):
    """ΔW = s · (w1_a w1_b) ⊙ (w2_a w2_b); in convolutions, optionally, with a kernel factor t within each product."""

    config = LoHaConfig
    prefix = "hada_"
    targets = LORA

    hada_w1_a: nn.Parameter  # (out, r); with t (r, out)
    hada_w1_b: nn.Parameter  # (r, fan_in); with t (r, in / groups)
    hada_w2_a: nn.Parameter
    hada_w2_b: nn.Parameter
    hada_t1: nn.Parameter  # (r, r, *kernel), padded to two kernel dims
    hada_t2: nn.Parameter
    scaling: float
    rank_dropout: float
    module_dropout: float

    @property
    def cp(self) -> bool:
        """Say whether the adapter factors the kernel of a convolution, too."""
        return self.cfg.use_effective_conv2d and math.prod(self.site.shape[2:]) > 1

    def describe(self) -> Effect:
        if not self.cp and is_narrow(self.cfg.r, self.site.out_features, self.site.fan_in):
            return LowRank(self.factors)
        return Update(self.delta, draws=self.cfg.rank_dropout > 0 or self.cfg.module_dropout > 0)

    def check(self) -> str | None:
        require_positive_rank(self.cfg.r)
        return super().check()

    def build(self, shared: dict[str, Any]) -> dict[str, Any]:
        site, cfg, r = self.site, self.cfg, self.cfg.r
        kernel = site.shape[2:]
        values = dict(
            r=r,
            alpha=cfg.alpha,
            scaling=cfg.alpha / r,
            rank_dropout=cfg.rank_dropout,
            module_dropout=cfg.module_dropout,
        )
        if self.cp:
            a, b = (r, site.out_features), (r, site.shape[1])
            t = (r, r, *kernel, *[1] * (2 - len(kernel)))
            shapes = dict(w1_a=a, w1_b=b, w2_a=a, w2_b=b, t1=t, t2=t)
        else:
            a, b = (site.out_features, r), (r, site.fan_in)
            shapes = dict(w1_a=a, w1_b=b, w2_a=a, w2_b=b)
        return values | {f"hada_{name}": nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()}

    def init(self) -> None:
        names = ["w1_a", "w1_b", "w2_a", "w2_b"]
        if self.cp:
            names += ["t1", "t2"]
        for name in names:
            if name == "w2_b" and self.cfg.init_weights:
                nn.init.zeros_(self.hada_w2_b)
            else:
                nn.init.kaiming_uniform_(getattr(self, f"hada_{name}"), a=math.sqrt(5))

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return a, b, c, d of ΔW = scaling · (a b) ⊙ (c d), as matrices; in training with dropout."""
        a, b, c, d = (getattr(self, f"hada_{name}") for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
        if self.cp:  # b and d take in the kernel's factors
            b, d = kernel_of(self.hada_t1, b), kernel_of(self.hada_t2, d)
            a, c = a.T, c.T
        return self.dropped(a), b, c, d

    def dropped(self, rows: Tensor) -> Tensor:
        """Return `rows` (out, …), in training with zeros where dropout takes rows out."""
        if not self.layer.training:
            return rows
        if self.rank_dropout:
            kept = (torch.rand(rows.shape[0], device=rows.device) > self.rank_dropout).to(rows.dtype)
            rows = rows * (kept / kept.mean().clamp(min=1e-6))[:, None]
        if self.module_dropout:
            rows = rows * (torch.rand(1, device=rows.device) > self.module_dropout)
        return rows

    def factors(self) -> Factors:
        """Return factors of rank r², for where they are cheaper than ΔW."""
        return Factors(*narrow(*self.parts()), scale=self.scaling)

    def delta(self) -> Hadamard:
        return Hadamard(*self.parts(), self.scaling, self.site.shape)


def kernel_of(t: Tensor, b: Tensor) -> Tensor:
    """Return Σ_j t[i, j] b[j], (r, in / groups · kernel size)."""
    return torch.einsum("ijk,jq->iqk", t.flatten(2), b).flatten(1)
