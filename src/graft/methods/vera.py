# SPDX-License-Identifier: Apache-2.0
"""VeRA: Vector-based Random Matrix Adaptation, arXiv 2310.11454."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from graft.config.fields import PHI_ATTENTION, BaseBias
from graft.core.effect import Factors
from graft.core.method import COMPARISON, PublishedRate
from graft.kernels.eager import cast
from graft.kernels.waits import copy_on_device
from graft.methods.projections import Projected, ProjectionConfig


@dataclass(kw_only=True)
class VeraConfig(ProjectionConfig, BaseBias):
    """VeRA: ΔW = diag(λ_b) B diag(λ_d) A, with random A and B that all layers share and that never train."""

    peft_type: str = "VERA"
    r: int = 256
    vera_dropout: float = 0.0
    d_initial: float = 0.1  # of λ_d
    init_weights: bool = True  # λ_b begins as zeros

    matrices = "vera_A and vera_B"


class VeRA(Projected[VeraConfig]):
    """VeRA, arXiv 2310.11454: ΔW = diag(λ_b) B diag(λ_d) A.

    A (r, in) and B (out, r) are random, frozen, and parts of matrices that all layers share.
    """

    prefix = "vera_lambda_"
    published_lr = PublishedRate(1e-3, 1e-2, COMPARISON + "; RandLoRA's code, commonsense reasoning")
    targets = PHI_ATTENTION

    vera_lambda_b: nn.Parameter  # (out,)
    vera_lambda_d: nn.Parameter  # (r,)
    vera_A: Tensor  # (r, widest in), shared
    vera_B: Tensor  # (widest out, r), shared
    vera_dropout: nn.Module

    def factors(self) -> Factors:
        """Return factors with the first `fan_in` columns of A and `out` rows of B, λ_d as `inner`, λ_b as `outer`, with
        dropout.

        A and B are copied to λ_d's device, and cast to its dtype.
        """
        d, b = self.vera_lambda_d, self.vera_lambda_b
        A, B = copy_on_device(self.vera_A, d.device), copy_on_device(self.vera_B, d.device)
        A, B = A[:, : self.site.fan_in], B[: self.site.out_features]
        A, B = cast(A, d.dtype), cast(B, d.dtype)  # FSDP casts parameters for a call, and leaves buffers as they are
        return Factors(A, B, dropout=self.vera_dropout, inner=d, outer=b)
