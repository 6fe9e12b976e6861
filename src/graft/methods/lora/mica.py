# SPDX-License-Identifier: Apache-2.0
"""MiCA: Minor Component Adaptation, arXiv 2604.01694.

The columns of B are the left singular vectors of W with the r smallest singular values. Only A trains.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graft.core.effect import Factors
from graft.core.errors import ConfigError, UnsupportedLayerError
from graft.core.method import Method
from graft.methods.lora.lora import LoRA


class MiCA(LoRA):
    """MiCA, arXiv 2604.01694: LoRA with B frozen at the r minor left singular vectors of W; A starts at zero and
    trains.
    """

    ungrouped = "MiCA takes singular vectors of a matrix, and a convolution with groups > 1 has one for each"

    def check(self) -> str | None:
        """Return the reason of `LoRA.check`. Before that, raises ConfigError if r is above the smaller side of a known
        layer's weight; an equal r passes.
        """
        site, r = self.site, self.cfg.r
        if site.op.known and r > min(site.out_features, site.fan_in):
            raise ConfigError(
                f"MiCA requires `r` <= min(in_features, out_features) but got r={r} for layer '{site.key}' with a "
                f"weight of shape {site.shape}. Choose a smaller r."
            )
        return super().check()

    def build(self, shared: dict[str, object], device: torch.device | None = None) -> dict[str, Any]:
        """Return LoRA's tensors, with B frozen (`requires_grad` False): the weight of `lora_B`, on an embedding
        `lora_embedding_B`. A bias still trains.
        """
        values = super().build(shared, device)
        B = values["lora_embedding_B"] if self.site.op.takes_ids else values["lora_B"].weight
        B.requires_grad_(False)
        return values

    def init_values(self) -> None:
        """Fill A with zeros and B with the left singular vectors of W₀ of its r smallest singular values.

        On the meta device do nothing.

        Raises:
            UnsupportedLayerError: the weight cannot be read.
        """
        layer, site = self.layer, self.site
        if site.on_meta:
            return
        why = site.weight.why_unreadable()
        if why is not None:
            raise UnsupportedLayerError(
                f"Target module {site.key} ({site.type_name}) is not supported. MiCA needs its weight, and {why}."
            )
        A, B = (p.data for p in self.pair)
        A.zero_()
        B.copy_(minor(layer.W0.flatten(1), len(A)).view(B.shape))

    def factors(self) -> Factors:
        """Return LoRA's factors. If A has another dtype than B, B is cast to A's, as a matrix (out, r)."""
        factors, (A, B) = super().factors(), self.pair
        if A.dtype != B.dtype:  # somebody cast the one that trains
            factors = factors._replace(B=B.to(A.dtype).flatten(1))
        return factors

    def tie_to_embedding(self, source: Method) -> None:
        """Raise ConfigError: a tied layer would have the frozen B as its A, so `ensure_weight_tying` cannot be used."""
        raise ConfigError(
            f"MiCA freezes B, which the tied layer '{self.site.key}' would have as its A. Leave ensure_weight_tying "
            "off, or choose another init_lora_weights."
        )


@torch.no_grad()
def minor(W: Tensor, r: int) -> Tensor:
    """Return the left singular vectors (out, r) of the r smallest singular values of W (out, in), in at least float32,
    without gradient.
    """
    return torch.linalg.svd(W.to(torch.promote_types(W.dtype, torch.float32)), full_matrices=False).U[:, -r:]
