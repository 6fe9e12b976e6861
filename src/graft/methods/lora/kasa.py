# SPDX-License-Identifier: Apache-2.0
"""KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models, arXiv 2412.06071.

ΔW = s · B diag(d) A, on the base weight without its r smallest singular components.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graft.config.base import PeftConfig
from graft.config.fields import require_sub_config
from graft.core.effect import Factors
from graft.core.errors import ConfigError
from graft.core.method import Tensors, WeightUse
from graft.kernels.orthogonal import gram_distance
from graft.methods.lora.lora import LoRA


class KaSA(LoRA):
    """KaSA, arXiv 2412.06071: ΔW = s · B diag(d) A with d (r,) that trains, on W without its r smallest singular
    components.

    The base weight stays without the components when the adapter is deleted.
    """

    lora_diag: nn.Parameter  # (r,)

    def check(self) -> str | None:
        """Return a reason against known layers that are not linear, else that of `LoRA.check`.

        Between the two, raises ConfigError if r ≥ the smaller side of a known layer's weight.
        """
        site, r = self.site, self.cfg.r
        if site.op.known and not site.op.linear:
            return "KaSA takes singular components out of a matrix: it adapts linear layers only"
        if site.op.known and r >= min(site.shape):
            raise ConfigError(
                f"KaSA requires `r` ({r}) to be smaller than min(in_features, out_features) ({min(site.shape)}) of "
                f"layer '{site.key}', or nothing would be left of its weight. Choose a smaller r."
            )
        return super().check()

    @classmethod
    def changes_base(cls, cfg: PeftConfig) -> str | None:
        """Return "kasa_config": `init_values` always changes the base weight."""
        return "kasa_config"

    @property
    def keeps_shift(self) -> bool:
        """False: a load computes the truncated weight anew, with the change of the initialisation."""
        return False  # the weight is made anew on loading, in one go with the truncation

    def uses_weight(self) -> WeightUse:
        """Return LoRA's flags with `WeightUse.BEFORE_LOAD`: `init_values` also runs before a load, since files lack the
        truncation.
        """
        return super().uses_weight() | WeightUse.BEFORE_LOAD

    def why_incompatible(self, other: object) -> str | None:
        """Return None if the other adapter has a `kasa_config`, too; else the reason that KaSA changes the base
        weights.
        """
        if getattr(other, "kasa_config", None) is not None:
            return None
        return "KaSA cannot be combined with adapters that don't use KaSA, since it changes the base weights"

    def build(self, shared: dict[str, object], device: torch.device | None = None) -> dict[str, object]:
        """Return LoRA's tensors and `lora_diag` (r,), uninitialised.

        The diagonal is made on `device` (None: the default one), in the default dtype.
        """
        return super().build(shared, device) | dict(lora_diag=nn.Parameter(torch.empty(self.cfg.r, device=device)))

    def init_values(self) -> None:
        """Initialise as LoRA, `lora_diag` with normal values; then remove the r smallest singular components from the
        base weight.

        The weight stays as it is if another KaSA adapter of the layer has at least rank r: its init has removed them.
        """
        super().init_values()
        self.lora_diag.data.normal_()
        ranks = [m.cfg.r for m in self.layer.methods.values() if m is not self and isinstance(m, KaSA)]
        if self.cfg.r > max(ranks, default=0):  # else the weight is without these already
            self.layer.rewrite_base(without_smallest(self.layer.W0, self.cfg.r))

    def factors(self) -> Factors:
        """Return LoRA's factors with `lora_diag` as `inner`, so that ΔW = s · B diag(d) A."""
        return super().factors()._replace(inner=self.lora_diag)

    def holding(self, A: Tensor, B: Tensor) -> Tensors:
        """Return the tensors that make ΔW = s · B A: LoRA's, and `lora_diag` full of ones, one for each rank of A."""
        return super().holding(A, B) | {("lora_diag", ""): A.new_ones(A.numel() // self.site.fan_in)}

    def loss(self) -> Tensor:
        """Return β ‖d‖² + γ (‖Bᵀ B - 1‖ + ‖A Aᵀ - 1‖), in float32."""
        A, B = (p.float() for p in self.pair)
        cfg = require_sub_config(self.cfg.kasa_config)
        size = self.lora_diag.float().square().sum()
        return cfg.beta * size + cfg.gamma * (gram_distance(B.T) + gram_distance(A))


@torch.no_grad()
def without_smallest(W: Tensor, r: int) -> Tensor:
    """Return W (out, in) minus its r smallest singular components, in W's dtype; the SVD runs in at least float32,
    without gradient.
    """
    wide = W.to(torch.promote_types(W.dtype, torch.float32))
    U, S, Vh = torch.linalg.svd(wide, full_matrices=False)
    smallest: Tensor = (U[:, -r:] * S[-r:]) @ Vh[-r:]
    return (wide - smallest).to(W.dtype)
