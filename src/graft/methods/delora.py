# SPDX-License-Identifier: Apache-2.0
"""DeLoRA: Decoupling Angles and Strength in Low-rank Adaptation, arXiv 2503.18225."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from torch import nn

from graft.config.fields import COUNT, LORA, LayerRange, RankPattern, Targeted
from graft.core.effect import Factors
from graft.core.method import Method, WeightUse, fill_kaiming, make_dropout

SHORTEST = 1e-4  # a shorter vector keeps its length: B starts at zero


@dataclass(kw_only=True)
class DeloraConfig(Targeted, LayerRange, RankPattern):
    """DeLoRA: ΔW of rank r with terms of strength λ / r, independent of the lengths of their vectors."""

    peft_type: str = "DELORA"
    r: Annotated[int, COUNT] = 8
    delora_lambda: float = 15  # λ in the beginning; it trains
    module_dropout: float = 0.0  # of the input
    bias: Literal["none", "all", "delora_only"] = "none"  # which base biases train
    init_weights: bool = True
    lambda_pattern: dict[str, float] | None = field(default_factory=dict)  # λ by layer name or regex

    patterns = {"rank_pattern": "r", "lambda_pattern": "delora_lambda"}


class DeLoRA(Method[DeloraConfig]):
    """DeLoRA, arXiv 2503.18225: ΔW = Σ λ / r · b_k (a_k ⊙ w)ᵀ / (‖a_k‖ ‖b_k‖), w the norms of the columns of W₀."""

    prefix = "delora_"
    weight_use = WeightUse.STARTS  # the file has the norms
    targets = LORA

    delora_A: nn.Parameter  # (r, fan_in)
    delora_B: nn.Parameter  # (out, r)
    delora_lambda: nn.Parameter  # (1,)
    delora_dropout: nn.Module

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return uninitialised parameters `delora_A` (r, fan_in), `delora_B` (out, r), `delora_lambda` (1,)
        and `delora_dropout` (`make_dropout(cfg.module_dropout)`).

        The buffer `delora_w_norm` (fan_in,) starts as ones. Floating-point tensors are made on the default device, in
        the default dtype.
        """
        cfg, site = self.cfg, self.site
        return dict(
            delora_A=nn.Parameter(torch.empty(cfg.r, site.fan_in)),
            delora_B=nn.Parameter(torch.empty(site.out_features, cfg.r)),
            delora_lambda=nn.Parameter(torch.empty(1)),
            delora_w_norm=torch.ones(site.fan_in),  # a buffer
            delora_dropout=make_dropout(cfg.module_dropout),
        )

    def init_values(self) -> None:
        """Fill A kaiming uniform (a=√5), B with zeros (as A with `init_weights=False`), λ with `delora_lambda`.

        The buffer gets the norms of the columns of W₀.
        """
        fill_kaiming(self.delora_A)
        self.fill_start(self.delora_B)
        self.delora_lambda.data.fill_(self.cfg.delora_lambda)
        self.delora_w_norm.copy_(torch.linalg.vector_norm(self.layer.W0.detach().flatten(1), dim=0))

    def factors(self) -> Factors:
        """Return A ⊙ w and B ⊙ λ / (r ‖a_k‖ ‖b_k‖), with dropout: a_k the rows of A, b_k the columns of B, w the buffer
        `delora_w_norm`. B keeps its dtype.

        Lengths are computed in at least float32, and are at least 1e-4.
        """
        A, B = self.delora_A, self.delora_B
        wide = torch.promote_types(A.dtype, torch.float32)  # λ over the shortest lengths is beyond half precision
        lengths = [v.to(wide).norm(dim=dim).clamp(min=SHORTEST) for v, dim in ((A, 1), (B, 0))]
        strength = self.delora_lambda / (len(A) * lengths[0] * lengths[1])  # (r,)
        norms = self.delora_w_norm.to(A.dtype)  # FSDP casts parameters for a call, and leaves buffers as they are
        return Factors(A * norms, (B * strength).to(B.dtype), dropout=self.delora_dropout)
