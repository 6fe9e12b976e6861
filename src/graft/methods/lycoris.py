# SPDX-License-Identifier: Apache-2.0
"""The base of LoHa and LoKr: products of small matrices, with dropout of ranks and modules.

LyCORIS, arXiv 2309.14859.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, TypeVar

import torch
from torch import Tensor

from graft.config.fields import COUNT, LORA, LayerRange, RankPatterns, Targeted
from graft.core.method import Method


@dataclass(kw_only=True)
class LycorisConfig(Targeted, LayerRange, RankPatterns):
    """The fields of LoHa and LoKr."""

    r: Annotated[int, COUNT] = 8
    alpha: float = 8  # ΔW has the factor alpha / r
    rank_dropout: float = 0.0  # drops output rows of ΔW in training
    module_dropout: float = 0.0  # drops all of ΔW in training
    use_effective_conv2d: bool = False  # factor convolution kernels as well (FedPara, proposition 3)


L = TypeVar("L", bound=LycorisConfig)


class Lycoris(Method[L]):
    """The base of LoHa and LoKr, arXiv 2309.14859: scaling alpha / r, dropout of ranks and modules, factored
    kernels.
    """

    targets = LORA
    facts: ClassVar[tuple[str, ...]] = ("r", "alpha", "rank_dropout", "module_dropout")

    scaling: float
    rank_dropout: float
    module_dropout: float

    def check(self) -> str | None:
        """Raise ConfigError if r < 1; else return the reason of `Method.check`."""
        COUNT.check("r", self.cfg.r)
        return super().check()

    def build_declared(self) -> dict[str, object]:
        """Return the config's values in `facts`, and scaling = alpha / r."""
        return super().build_declared() | dict(scaling=self.cfg.alpha / self.cfg.r)

    @property
    def cp(self) -> bool:
        """True if the adapter factors the kernel of a convolution, too: `use_effective_conv2d`, and a kernel larger
        than one.
        """
        return self.cfg.use_effective_conv2d and math.prod(self.site.shape[2:]) > 1

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """The shape of a kernel's factor: (r, r, *kernel), padded to two kernel dims."""
        r, kernel = self.cfg.r, self.site.shape[2:]
        return r, r, *kernel, *[1] * (2 - len(kernel))

    @property
    def draws(self) -> bool:
        """True if ΔW is random in training: one of the two dropout rates is above 0."""
        return bool(self.cfg.rank_dropout or self.cfg.module_dropout)

    def row_mask(self, like: Tensor, rescale: bool) -> Tensor | None:
        """Return factors of the output rows, (out,), 0 for dropped ones; None in eval mode or without dropout.

        `rank_dropout` drops single rows at random, `module_dropout` all at once; with both they multiply.

        Args:
            like: a tensor of the wanted dtype and device.
            rescale: divide by the share of rows that `rank_dropout` left, at least 1e-6; `module_dropout` is not made
                up for.
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
    """Return Σ_j t[i, j] b[j] of t (r, r, *kernel) and b (r, n), as a matrix (r, n · kernel size)."""
    return torch.einsum("ijk,jq->iqk", t.flatten(2), b).flatten(1)
