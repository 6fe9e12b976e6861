# SPDX-License-Identifier: Apache-2.0
"""The gates of a call of an X-LoRA model: the weight of each expert at each token, by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graft.core.errors import RoutingError


@dataclass(eq=False)
class Scalings:
    weights: Tensor  # (batch, tokens, layers, experts)
    layers: dict[str, int]  # path → place in `weights`
    experts: dict[str, int]  # adapter → place in `weights`

    def apply(self, layer: Any, adapter: str, part: Tensor) -> Tensor:
        w = self.weights[:, :, self.layers[layer.site.key], self.experts[adapter]]
        if part.shape[:2] != w.shape:
            raise RoutingError(
                f"layer '{layer.site.key}' computes {tuple(part.shape[:2])} (samples, tokens), and X-LoRA weighs "
                f"experts at {tuple(w.shape)}: leave the layer out of the experts' target_modules."
            )
        return part * w[..., None].to(part.device)

    def rows(self, index: Tensor) -> Scalings:
        return Scalings(self.weights[index.to(self.weights.device)], self.layers, self.experts)


def chosen(scalings: Tensor, cfg: Any) -> Tensor:
    """Return the weights that act: the `top_k_lora` largest, through a softmax if wanted, times the global weight."""
    if cfg.top_k_lora is not None:
        kept = scalings.topk(cfg.top_k_lora, dim=-1).indices
        scalings = scalings * torch.zeros_like(scalings).scatter(-1, kept, 1)
    if cfg.enable_softmax_topk:
        out = scalings == 0
        scalings = scalings.masked_fill(out, -torch.inf).softmax(-1).masked_fill(out, 0)
    weights: Tensor = scalings * cfg.global_scaling_weight
    return weights
