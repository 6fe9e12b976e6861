# SPDX-License-Identifier: Apache-2.0
"""LoHa: low-rank Hadamard product. FedPara, arXiv 2108.06098; LyCORIS, arXiv 2309.14859."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graft.core.effect import Effect, Factors, LowRank, Update
from graft.kernels.one_product import Hadamard, is_narrow, narrow
from graft.methods.lycoris import Lycoris, LycorisConfig, kernel_of


@dataclass(kw_only=True)
class LoHaConfig(LycorisConfig):
    """LoHa: ΔW = alpha / r · (w1_a w1_b) ⊙ (w2_a w2_b), of rank up to r²."""

    peft_type: Any = "LOHA"
    init_weights: bool = True


class LoHa(Lycoris):
    """ΔW = s · (w1_a w1_b) ⊙ (w2_a w2_b); in convolutions, optionally, with a kernel factor t within each product."""

    config = LoHaConfig
    prefix = "hada_"

    hada_w1_a: nn.Parameter  # (out, r); with t (r, out)
    hada_w1_b: nn.Parameter  # (r, fan_in); with t (r, in / groups)
    hada_w2_a: nn.Parameter
    hada_w2_b: nn.Parameter
    hada_t1: nn.Parameter  # (r, r, *kernel), padded to two kernel dims
    hada_t2: nn.Parameter

    def describe(self) -> Effect:
        if not self.cp and is_narrow(self.cfg.r, self.site.out_features, self.site.fan_in):
            return LowRank(self.factors)
        return Update(self.delta, draws=self.draws)

    def build(self, shared: dict[str, Any]) -> dict[str, Any]:
        site, r = self.site, self.cfg.r
        if self.cp:
            a, b, t = (r, site.out_features), (r, site.shape[1]), self.kernel_shape
            shapes: dict[str, tuple[int, ...]] = dict(w1_a=a, w1_b=b, w2_a=a, w2_b=b, t1=t, t2=t)
        else:
            a, b = (site.out_features, r), (r, site.fan_in)
            shapes = dict(w1_a=a, w1_b=b, w2_a=a, w2_b=b)
        return self.facts() | {f"hada_{name}": nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()}

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
        kept = self.kept(a, rescale=True)
        return a if kept is None else a * kept[:, None], b, c, d

    def factors(self) -> Factors:
        """Return factors of rank r², for where they are cheaper than ΔW."""
        return Factors(*narrow(*self.parts()), scale=self.scaling)

    def delta(self) -> Hadamard:
        return Hadamard(*self.parts(), self.scaling, self.site.shape)
