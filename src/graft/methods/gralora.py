# SPDX-License-Identifier: Apache-2.0
"""GraLoRA: Granular Low-Rank Adaptation, arXiv 2505.20355."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from graft.config.fields import COUNT, LORA, NOT_NEGATIVE, BaseBias, FanInFanOut, LayerRange, Targets
from graft.core.effect import Factors
from graft.core.errors import ConfigError
from graft.core.method import COMPARISON, Method, PublishedRate, fill_kaiming
from graft.core.ops import make_linear
from graft.kernels.structured import Inputs, Outputs
from graft.methods.projections import indivisible


@dataclass(kw_only=True)
class GraloraConfig(Targets, LayerRange, FanInFanOut, BaseBias):
    """GraLoRA: k × k blocks of the weight, each with its own factors; together of rank up to k r.

    Raises:
        ConfigError: k does not divide r, or one of the numbers is too small.
    """

    peft_type: str = "GRALORA"
    r: Annotated[int, COUNT] = 32  # rank of each row, and of each column, of blocks
    hybrid_r: Annotated[int, NOT_NEGATIVE] = 0  # rank of a plain low-rank update in addition to the blocks
    alpha: float = 64  # the scaling is alpha / (r + hybrid_r)
    gralora_dropout: float = 0.0
    gralora_k: Annotated[int, COUNT] = 2  # the weight has k × k blocks; must divide r and the widths of all layers
    init_weights: bool = True

    def __post_init__(self) -> None:
        """Validate the fields; raise ConfigError if `gralora_k` does not divide r."""
        super().__post_init__()
        if self.r % self.gralora_k:
            raise ConfigError(f"r should be divisible by gralora_k, but got {self.r} and {self.gralora_k}")


class GraLoRA(Method[GraloraConfig]):
    """GraLoRA, arXiv 2505.20355: ΔW = s · the blocks (A_n[:, j] B_j[n, :])ᵀ, j = 1 … k of the output, n of the input;
    and s · B A, if hybrid.
    """

    prefix = "gralora_"
    published_lr = PublishedRate(2e-4, 2e-4, COMPARISON)
    targets = LORA
    facts = ("r", "hybrid_r", "gralora_k", "alpha")

    gralora_A_general: nn.Module  # weight (hybrid_r, in)
    gralora_B_general: nn.Module  # weight (out, hybrid_r)
    gralora_A: nn.Parameter  # (k, in / k, r)
    gralora_B: nn.Parameter  # (k, r, out / k)
    gralora_dropout: nn.Module
    scaling: float

    def check(self) -> str | None:
        """Return the reason of `Method.check`, or, only if that is None, that `gralora_k` does not divide in_features
        or out_features.
        """
        text = f"{{name}} should be divisible by gralora_k, but got {{size}} and {self.cfg.gralora_k}"
        return super().check() or indivisible(self.site, self.cfg.gralora_k, text)

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return the parameters `gralora_A` (k, in / k, r) and `gralora_B` (k, r, out / k) with the values of `blocks`,
        and scaling = alpha / (r + hybrid_r). With `hybrid_r` also the linear layers `gralora_A_general` (hybrid_r, in)
        and `gralora_B_general` (out, hybrid_r), which `init_values` fills. Floating-point tensors are made on the
        default device, in the default dtype.
        """
        cfg, site = self.cfg, self.site
        A, B = self.blocks()
        values: dict[str, object] = dict(
            gralora_A=nn.Parameter(A),
            gralora_B=nn.Parameter(B),
            scaling=cfg.alpha / (cfg.r + cfg.hybrid_r),
        )
        if cfg.hybrid_r:
            values["gralora_A_general"] = make_linear(site.fan_in, cfg.hybrid_r, False, fill=False)
            values["gralora_B_general"] = make_linear(cfg.hybrid_r, site.out_features, False, fill=False)
        return values

    def blocks(self) -> tuple[Tensor, Tensor]:
        """Draw A (k, in / k, r) and B (k, r, out / k), block by block in PEFT's order: A kaiming uniform (a=√5), B
        zeros, or as A with `init_weights=False`. Both in the default dtype.
        """
        cfg, k = self.cfg, self.cfg.gralora_k
        sizes = self.site.fan_in // k, self.site.out_features // k
        A, B = [], []
        for _ in range(k):
            A.append(draw_factor(cfg.r, sizes[0]).T)
            B.append(torch.zeros(cfg.r, sizes[1]) if cfg.init_weights else draw_factor(sizes[1], cfg.r).T)
        return torch.stack(A), torch.stack(B)

    def init_values(self) -> None:
        """With `hybrid_r`, fill the plain factors: A kaiming uniform (a=√5), B zeros (as A with `init_weights=False`).

        Else do nothing.
        """
        if not self.cfg.hybrid_r:
            return
        A = self.gralora_A_general.weight
        B = self.gralora_B_general.weight
        fill_kaiming(A)
        self.fill_start(B)

    def factors(self) -> Factors:
        """Return factors of the blocks, with the plain ones if hybrid, the scaling and the dropout.

        On layers that take vectors A and B are products that form no matrix, else matrices.
        """
        A, B = (getattr(self, f"gralora_{x}_general") if self.cfg.hybrid_r else None for x in "AB")
        A, B = Inputs(self.gralora_A, A), Outputs(self.gralora_B, B)
        if not self.site.multiplies_vectors:  # the layer takes matrices
            A, B = A.weight, B.weight
        return Factors(A, B, scale=self.scaling, dropout=self.gralora_dropout)


def draw_factor(out: int, fan_in: int) -> Tensor:
    """Return a new tensor (out, fan_in), kaiming uniform with a=√5."""
    return fill_kaiming(torch.empty(out, fan_in))
