# SPDX-License-Identifier: Apache-2.0
"""HiRA: Parameter-Efficient Hadamard High-Rank Adaptation, ICLR 2025, openreview.net/forum?id=TwJrTz9cRS."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from graft.config.fields import COUNT, LORA, FanInFanOut, LayerRange, RankPattern, Targeted
from graft.core.effect import Effect, Update
from graft.core.method import COMPARISON, Method, PublishedRate
from graft.kernels.one_product import Modulated


@dataclass(kw_only=True)
class HiraConfig(Targeted, LayerRange, RankPattern, FanInFanOut):
    """HiRA: ΔW = W ⊙ (B A), of any rank that W has, from factors of rank r."""

    peft_type: str = "HIRA"
    r: Annotated[int, COUNT] = 32
    hira_dropout: float = 0.0
    init_weights: bool | Literal["gaussian"] | None = True  # values of A; B is zero. False or None: both random


class HiRA(Method[HiraConfig]):
    """HiRA, ICLR 2025: ΔW = W₀ ⊙ (B A).

    A has the inputs that the weight stores: in / groups for a convolution with groups.
    """

    prefix = "hira_"
    published_lr = PublishedRate(4.5e-3, 4.5e-3, COMPARISON)
    targets = LORA

    hira_A: nn.Parameter  # (r, in / groups, *kernel)
    hira_B: nn.Parameter  # (out, r, 1, …)
    hira_embedding_A: nn.Parameter  # (r, vocabulary)
    hira_embedding_B: nn.Parameter  # (embedding_dim, r)
    hira_dropout: nn.Module

    def describe(self) -> Effect:
        """Return an `Update` by `delta` that reads W₀ (`of_weight`), with the dropout."""
        return Update(self.delta, of_weight=True, dropout=self.dropout)

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return `hira_A` (r, in / groups, *kernel) and `hira_B` (out, r, 1, …) of normal values.

        On an embedding they are called `hira_embedding_A` and `hira_embedding_B`. Floating-point tensors are made on
        the default device, in the default dtype.
        """
        site, r = self.site, self.cfg.r
        kernel = site.shape[2:]
        A, B = torch.randn(r, site.shape[1], *kernel), torch.randn(site.out_features, r, *[1] * len(kernel))
        where = "hira_embedding_" if site.op.takes_ids else "hira_"
        return {f"{where}A": nn.Parameter(A), f"{where}B": nn.Parameter(B)}

    def init_values(self) -> None:
        """Fill A kaiming uniform (a=√5), or normal with std 1/r for "gaussian", and B with zeros; on an embedding A
        zeros, B normal.

        With `init_weights` False or None keep the normal values of `build`.
        """
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
        """The factors A (r, …) and B (out, r, …): `hira_embedding_A`, `_B` on an embedding, else `hira_A`, `hira_B`."""
        if self.site.op.takes_ids:
            return self.hira_embedding_A, self.hira_embedding_B
        return self.hira_A, self.hira_B

    def dropout(self) -> nn.Module:
        """Return the module `hira_dropout`."""
        return self.hira_dropout

    def delta(self, W0: Tensor) -> Modulated:  # type: ignore[override]
        """Return W₀ ⊙ (B A) as a `Modulated`, which is not formed until somebody needs it."""
        A, B = self.pair
        return Modulated(W0, B.flatten(1), A.flatten(1))
