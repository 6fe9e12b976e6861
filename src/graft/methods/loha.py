# SPDX-License-Identifier: Apache-2.0
"""LoHa: low-rank Hadamard product. FedPara, arXiv 2108.06098; LyCORIS, arXiv 2309.14859."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from graft.config.fields import LayerRange, RankPatterns, Targeted, require_positive_rank
from graft.config.targets import LORA
from graft.core.method import Method
from graft.core.site import Site
from graft.kernels.hadamard import is_narrow, linear_with, narrow, product
from graft.kernels.low_rank import add_low_rank, low_rank_linear
from graft.kernels.worth import worth_it


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
    """ΔW = s · (w1_a w1_b) ⊙ (w2_a w2_b); of convolutions, optionally, each product with a kernel factor t between."""

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

    @classmethod
    def build(cls, site: Site, cfg: LoHaConfig, shared):
        r, out_features = cfg.r, site.out_features
        require_positive_rank(r)
        kernel = site.shape[2:]
        values = dict(
            r=r,
            alpha=cfg.alpha,
            scaling=cfg.alpha / r,
            rank_dropout=cfg.rank_dropout,
            module_dropout=cfg.module_dropout,
        )
        if cfg.use_effective_conv2d and math.prod(kernel) > 1:
            a, b = (r, out_features), (r, site.shape[1])
            t = (r, r, *kernel, *[1] * (2 - len(kernel)))
            shapes = dict(w1_a=a, w1_b=b, w2_a=a, w2_b=b, t1=t, t2=t)
        else:
            a, b = (out_features, r), (r, site.fan_in)
            shapes = dict(w1_a=a, w1_b=b, w2_a=a, w2_b=b)
        return values | {f"hada_{name}": nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()}

    def init(self, cfg: LoHaConfig) -> None:
        names = ["w1_a", "w1_b", "w2_a", "w2_b"]
        if self.cp:
            names += ["t1", "t2"]
        for name in names:
            if name == "w2_b" and cfg.init_weights:
                nn.init.zeros_(self.hada_w2_b)
            else:
                nn.init.kaiming_uniform_(getattr(self, f"hada_{name}"), a=math.sqrt(5))

    @property
    def cp(self) -> bool:
        """Whether the kernel is factored, too."""
        return self.name in getattr(self.layer, "hada_t1", ())

    def delta(self) -> Tensor:
        w1a, w1b, w2a, w2b = self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b
        if self.cp:
            dense = _kernel(self.hada_t1, w1a, w1b) * _kernel(self.hada_t2, w2a, w2b)
        else:
            dense = product(w1a, w1b, w2a, w2b)
        return self.scaling * dense.reshape(self.layer.site.shape)

    @property
    def narrow(self) -> bool:
        """Whether factors of rank r² are cheaper than ΔW."""
        return not self.cp and is_narrow(self.r, self.layer.out_features, self.layer.fan_in)

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """w1_a, w1_b, w2_a, w2_b of ΔW = scaling · (w1_a w1_b) ⊙ (w2_a w2_b), in training with dropout."""
        return self.dropped(self.hada_w1_a), self.hada_w1_b, self.hada_w2_a, self.hada_w2_b

    def dropped(self, rows: Tensor) -> Tensor:
        """`rows` (out, …), in training less what dropout takes out."""
        if not self.layer.training:
            return rows
        if self.rank_dropout:
            kept = (torch.rand(rows.shape[0], device=rows.device) > self.rank_dropout).to(rows.dtype)
            rows = rows * (kept / kept.mean().clamp(min=1e-6)).view(-1, *[1] * (rows.dim() - 1))
        if self.module_dropout:
            rows = rows * (torch.rand(1, device=rows.device) > self.module_dropout)
        return rows

    def join(self, x: Tensor) -> Tensor:
        layer, base = self.layer, self.layer.base_layer
        W = layer.base_weight
        if self.narrow:
            return low_rank_linear(base, layer.op.input_gradient, W, x, *narrow(*self.parts()), self.scaling)
        if not (worth_it(x) and W.dtype == x.dtype == self.dtype):  # a sum would round ΔW to the dtype of W
            return super().join(x)
        return linear_with(
            W, base.bias, x, *self.parts(), self.scaling, partial(layer.op.call, base), layer.op.input_gradient
        )

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        layer = self.layer
        if not (layer.may_fuse and self.narrow):
            return super().post(x, y)
        return add_low_rank(y, x, *narrow(*self.parts()), self.scaling)

    def branch(self, x: Tensor) -> Tensor:
        op, base = self.layer.op, self.layer.base_layer
        if self.narrow and op.factorable(base):
            A, B = narrow(*self.parts())
            return op.up(base, op.down(base, x, A), B) * self.scaling
        return op.call(base, x, self.dropped(self.delta()), None)


def _kernel(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Σ_ij t[i, j] a[i] b[j]: (out, in / groups, kernel size)."""
    return torch.einsum("ijk,jq,ip->pqk", t.flatten(2), b, a)
