# SPDX-License-Identifier: Apache-2.0
"""X-LoRA's classifier: from the hidden state of a token to a weight for each expert in each layer."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from graft.core.errors import RoutingError


class XLoraClassifier(nn.Module):
    """Linear layers with ReLU and dropout between them, and a softmax over the experts.

    Attributes:
        log_scalings: the weights of the calls since logging was turned on, (batch, tokens, layers, experts) each.
    """

    def __init__(self, config: Any, n_classes: int, n_layers: int, where: dict[str, Any]):
        super().__init__()
        self.config, self.n_classes, self.n_layers = config, n_classes, n_layers
        self.log_scalings: list[Tensor] = []
        self.scalings_logging = False
        self.latest: Tensor | None = None
        outputs = n_classes * (n_layers if config.layerwise_scalings else 1)
        widths = [config.hidden_size, *[config.xlora_size] * (config.xlora_depth - 1), outputs]
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise(widths)):
            if i:
                layers.append(nn.ReLU())
                if config.xlora_dropout_p > 0:
                    layers.append(nn.Dropout(config.xlora_dropout_p))
            layers.append(nn.Linear(before, after, **where))
        self.layers = nn.Sequential(*layers)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "latest": None}  # a part of a graph, which cannot be copied

    def forward(self, hidden: Tensor) -> Tensor:
        """Return weights (batch, tokens, layers, experts) for hidden states (batch, tokens, width)."""
        if hidden.shape[-1] != self.config.hidden_size:
            raise RoutingError(
                f"X-LoRA's classifier reads hidden states of width {self.config.hidden_size}, and the base model's "
                f"have {hidden.shape[-1]}: set XLoraConfig.hidden_size to that."
            )
        logits = self.layers(hidden.to(self.layers[0].weight))  # type: ignore[arg-type]
        logits = logits.unflatten(-1, (-1, self.n_classes))
        if self.config.enable_softmax:
            logits = (logits / self.config.softmax_temperature).softmax(-1)
        scalings: Tensor = logits.expand(-1, -1, self.n_layers, -1)
        self.latest = scalings
        if self.scalings_logging:
            self.log_scalings.append(scalings.detach())
        return scalings

    def constant(self, like: Tensor, value: float) -> Tensor:
        """Return the weights of the first pass, all `value`, for inputs (batch, tokens, …)."""
        shape = *like.shape[:2], self.n_layers, self.n_classes
        return torch.full(shape, value, device=like.device, dtype=self.layers[0].weight.dtype)  # type: ignore[arg-type]
