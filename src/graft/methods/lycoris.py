# SPDX-License-Identifier: Apache-2.0
"""The base of LoHa and LoKr: products of small matrices, with dropout of ranks and modules.

LyCORIS, arXiv 2309.14859.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, TypeVar

import torch
from torch import Tensor

from graft.config.fields import COUNT, LORA, LayerRange, RankPatterns, Targeted
from graft.core.method import Method


@dataclass(kw_only=True)
class LycorisConfig(Targeted, LayerRange, RankPatterns):
    r: Annotated[int, COUNT] = 8
    alpha: float = 8  # ΔW has the factor alpha / r
    rank_dropout: float = 0.0  # drops output rows of ΔW in training
    module_dropout: float = 0.0  # drops all of ΔW in training
    use_effective_conv2d: bool = False  # factor convolution kernels as well (FedPara, proposition 3)


L = TypeVar("L", bound=LycorisConfig)


class Lycoris(Method[L]):
    targets = LORA

    scaling: float
    rank_dropout: float
    module_dropout: float

    def check(self) -> str | None:
        COUNT.check("r", self.cfg.r)
        return super().check()

    def facts(self) -> dict[str, object]:
        """Return the plain facts that `build` adds to the layer."""
        cfg = self.cfg
        return dict(
            r=cfg.r,
            alpha=cfg.alpha,
            scaling=cfg.alpha / cfg.r,
            rank_dropout=cfg.rank_dropout,
            module_dropout=cfg.module_dropout,
        )

    @property
    def cp(self) -> bool:
        """Return True if the adapter factors the kernel of a convolution, too."""
        return self.cfg.use_effective_conv2d and math.prod(self.site.shape[2:]) > 1

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """The shape of a kernel's factor: (r, r, *kernel), padded to two kernel dims."""
        r, kernel = self.cfg.r, self.site.shape[2:]
        return r, r, *kernel, *[1] * (2 - len(kernel))

    @property
    def draws(self) -> bool:
        """Return True if ΔW is random in training."""
        return bool(self.cfg.rank_dropout or self.cfg.module_dropout)

    def row_mask(self, like: Tensor, rescale: bool) -> Tensor | None:
        """Return factors of the output rows, zeros where dropout takes them out, (out,); None if it takes out none.

        Args:
            like: a tensor of their dtype and device.
            rescale: scale up what `rank_dropout` leaves.
        """
        if not (self.layer.training and (self.rank_dropout or self.module_dropout)):
            return None
        mask = like.new_ones(self.site.out_features)
        if self.rank_dropout:
            mask = (torch.rand(len(mask), device=like.device) > self.rank_dropout).to(like.dtype)
            if rescale:
                mask = mask / mask.mean().clamp(min=1e-6)
        if self.module_dropout:
            mask = mask * (torch.rand(1, device=like.device) > self.module_dropout)
        return mask


def kernel_of(t: Tensor, b: Tensor) -> Tensor:
    """Return Σ_j t[i, j] b[j], (r, in / groups · kernel size)."""
    return torch.einsum("ijk,jq->iqk", t.flatten(2), b).flatten(1)
