# SPDX-License-Identifier: Apache-2.0
"""VeRA: Vector-based Random Matrix Adaptation, arXiv 2310.11454."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graft.config.fields import PHI_ATTENTION, BaseBias
from graft.core.effect import Factors
from graft.core.method import COMPARISON, AdaptedLayers, Method, PublishedRate
from graft.kernels.eager import cast
from graft.kernels.waits import copy_on_device
from graft.methods.projections import DRAWN, ProjectionConfig, projections


@dataclass(kw_only=True)
class VeraConfig(ProjectionConfig, BaseBias):
    """VeRA: ΔW = diag(λ_b) B diag(λ_d) A, with random A and B that all layers share and that never train."""

    peft_type: str = "VERA"
    r: int = 256
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    init_weights: bool = True

    matrices = "vera_A and vera_B"


class VeRA(Method[VeraConfig]):
    """VeRA, arXiv 2310.11454: ΔW = diag(λ_b) B diag(λ_d) A.

    A (r, in) and B (out, r) are random, frozen, and parts of matrices that all layers share.
    """

    prefix = "vera_lambda_"
    published_lr = PublishedRate(1e-3, 1e-2, COMPARISON + "; RandLoRA's code, commonsense reasoning")
    targets = PHI_ATTENTION
    agreeing_fields = DRAWN

    vera_lambda_b: nn.Parameter  # (out,)
    vera_lambda_d: nn.Parameter  # (r,)
    vera_A: Tensor  # (r, widest in), shared
    vera_B: Tensor  # (widest out, r), shared
    vera_dropout: nn.Module

    @classmethod
    def share(cls, layers: AdaptedLayers) -> dict[str, object]:
        """Return the shared random matrices `vera_A` (r, widest in) and `vera_B` (widest out, r): see `projections`."""
        return projections(layers, ("vera_A", "vera_B"), layers.cfg.r)

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return the shared matrices, `vera_lambda_b` (out,) of ones, `vera_lambda_d` (r,) of normal values, both
        trained. Floating-point tensors are made on the
        default device, in the default dtype.
        """
        return shared | dict(
            vera_lambda_b=nn.Parameter(torch.ones(self.site.out_features)),
            vera_lambda_d=nn.Parameter(torch.randn(self.cfg.r)),
        )

    def init_values(self) -> None:
        """Fill λ_d with `d_initial` and λ_b with zeros.

        With `init_weights=False` keep the values of `build`: normal and ones.
        """
        if self.cfg.init_weights:
            nn.init.constant_(self.vera_lambda_d, self.cfg.d_initial)
            nn.init.zeros_(self.vera_lambda_b)

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
