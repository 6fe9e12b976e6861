# SPDX-License-Identifier: Apache-2.0
"""HiRA: Parameter-Efficient Hadamard High-Rank Adaptation, ICLR 2025, openreview.net/forum?id=TwJrTz9cRS."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from graft.config.fields import COUNT, LORA, FanInFanOut, LayerRange, RankPattern, Targeted
from graft.core.effect import Effect, Update
from graft.core.method import COMPARISON, Method, Published, dropout_for
from graft.kernels.one_product import Modulated


@dataclass(kw_only=True)
class HiraConfig(Targeted, LayerRange, RankPattern, FanInFanOut):
    """HiRA: ΔW = W ⊙ (B A), of any rank that W has, from factors of rank r."""

    peft_type: str = "HIRA"
    r: Annotated[int, COUNT] = 32
    hira_dropout: float = 0.0
    init_weights: bool | Literal["gaussian"] | None = True  # values of A; B is zero. False or None: both random


class HiRA(Method[HiraConfig]):
    """ΔW = W₀ ⊙ (B A). A has the inputs that the weight stores: in / groups for a convolution with groups."""

    prefix = "hira_"
    published_lr = Published(4.5e-3, 4.5e-3, COMPARISON)
    targets = LORA
    empty: ClassVar[dict[str, nn.ParameterDict | nn.ModuleDict]] = {
        f"hira_{x}": nn.ParameterDict() for x in ("A", "B", "embedding_A", "embedding_B")
    }

    hira_A: nn.Parameter  # (r, in / groups, *kernel)
    hira_B: nn.Parameter  # (out, r, 1, …)
    hira_embedding_A: nn.Parameter  # (r, vocabulary)
    hira_embedding_B: nn.Parameter  # (embedding_dim, r)
    hira_dropout: nn.Module

    def describe(self) -> Effect:
        return Update(self.delta, of_weight=True, dropout=self.dropout)

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        site, r = self.site, self.cfg.r
        kernel = site.shape[2:]
        A, B = torch.randn(r, site.shape[1], *kernel), torch.randn(site.out_features, r, *[1] * len(kernel))
        where = "hira_embedding_" if site.op.takes_ids else "hira_"
        dropout = dropout_for(self.cfg.hira_dropout)
        return {"r": r, "hira_dropout": dropout, f"{where}A": nn.Parameter(A), f"{where}B": nn.Parameter(B)}

    def init(self) -> None:
        start, (A, B) = self.cfg.init_weights, self.pair
        if not start:
            return
        if self.site.op.takes_ids:
            nn.init.zeros_(A)
            nn.init.normal_(B)
            return
        if start == "gaussian":
            nn.init.normal_(A, std=1 / self.cfg.r)
        else:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        nn.init.zeros_(B)

    @property
    def pair(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The factors A (r, …) and B (out, r, …)."""
        if self.site.op.takes_ids:
            return self.hira_embedding_A, self.hira_embedding_B
        return self.hira_A, self.hira_B

    def dropout(self) -> nn.Module:
        return self.hira_dropout

    def delta(self, W0: Tensor) -> Modulated:  # type: ignore[override]
        A, B = self.pair
        return Modulated(W0, B.flatten(1), A.flatten(1))
