# SPDX-License-Identifier: Apache-2.0
"""QA-LoRA: Quantization-Aware Low-Rank Adaptation, arXiv 2309.14717.

A (r, in / g) sees means over groups of g inputs, times their number in / g. So ΔW is constant within each group, as
the zero points of a base are that is quantized by groups.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graft.core.effect import Compact, Factors
from graft.core.errors import ConfigError
from graft.core.method import fill_kaiming
from graft.core.random import skip_draws
from graft.methods.lora import checks
from graft.methods.lora.lora import LoRA


class Pooled(nn.Module):
    """A linear layer on scaled sums over groups of `size` inputs: (…, in_features) → (…, out_features).

    The sum of a group counts in_features / size²: the group's mean times the number of groups.
    """

    def __init__(self, size: int, in_features: int, out_features: int, device: torch.device | None = None):
        """Make an uninitialised parameter `weight` (out_features, in_features // size)."""
        super().__init__()
        self.in_features, self.out_features, self.size = in_features, out_features, size
        self.weight = nn.Parameter(torch.empty(out_features, in_features // size, device=device))

    @property
    def factor(self) -> float:
        """The factor of a sum over one group: in_features / size²."""
        return self.in_features / self.size**2

    def forward(self, x: Tensor) -> Tensor:
        """Return (sums of x over groups of `size`) · (weight · factor)ᵀ, (…, out_features)."""
        return x.unflatten(-1, (-1, self.size)).sum(-1) @ (self.weight * self.factor).T

    def matrix(self, weight: Tensor) -> Tensor:
        """Return M (out, in) with `forward`(x) = x Mᵀ: each column of `weight` (out, in / size) times `factor`,
        repeated `size` times.
        """
        return (weight * self.factor).repeat_interleave(self.size, 1)

    def extra_repr(self) -> str:
        """Return the two sizes and the group's size for `repr`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, size={self.size}"


class QALoRA(LoRA):
    """QA-LoRA, arXiv 2309.14717: LoRA with A (r, in / g) on scaled sums over groups of g = `qalora_group_size`
    inputs.
    """

    holds_any = False

    def check(self) -> str | None:
        """Return the reason of `LoRA.check`, after these errors, in this order.

        Raises:
            ConfigError: a known layer is not linear; g < 1 or g does not divide in_features; an initialisation that
                needs a whole A (`checks.plain_start`).
        """
        site, size = self.site, self.cfg.qalora_group_size
        why = checks.only_linear(site, "QA-LoRA sums groups of the features of linear layers")
        if why is not None:
            raise ConfigError(f"use_qalora=True has no meaning for layer '{site.key}' ({site.type_name}): {why}.")
        if size <= 0 or site.in_features % size:
            raise ConfigError(
                f"`use_qalora=True` requires `module.in_features` ({site.in_features}) to be divisible by "
                f"'qalora_group_size' ({size}), on layer '{site.key}'."
            )
        checks.plain_start(site, self.cfg, "use_qalora")
        return super().check()

    def build(self, shared: dict[str, object], device: torch.device | None = None) -> dict[str, object]:
        """Return LoRA's tensors, with `lora_A` replaced by a `Pooled` with weight (r, in / g)."""
        size = self.cfg.qalora_group_size
        return super().build(shared, device) | dict(lora_A=Pooled(size, self.site.in_features, self.cfg.r, device))

    def init_values(self) -> None:
        """Initialise as LoRA.

        With init_lora_weights=True the generator first advances as far as for a whole A, as in PEFT. With False, A then
        gets kaiming uniform values with a = √5; B stays random.
        """
        how = self.cfg.init_lora_weights
        if how is True:  # as if a whole A had been drawn before, which PEFT does
            skip_draws(torch.empty(self.cfg.r, self.site.in_features))
        super().init_values()
        if how is False:
            fill_kaiming(self.pair[0])

    def factors(self) -> Factors:
        """Return LoRA's factors with A as a `Compact`, which forms its whole matrix (r, in) on demand."""
        return super().factors()._replace(A=Compact(self.lora_A, self.lora_A.matrix))
