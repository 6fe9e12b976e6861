# SPDX-License-Identifier: Apache-2.0
"""DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv 2402.09353.

W' = m ⊙ (W + ΔW) / ‖W + ΔW‖, with norms over the inputs of each output channel. The norm takes no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graft.core import merging
from graft.core.dropout import share_dropped
from graft.core.site import Site
from graft.kernels import decomposed
from graft.kernels.low_rank import dropout
from graft.kernels.norm import row_norms
from graft.kernels.worth import worth_it
from graft.methods.lora.config import LoraConfig
from graft.methods.lora.lora import LoRA
from graft.methods.lora.plain import plain_factors


class Magnitude(nn.Module):
    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self) -> Tensor:
        return self.weight


class DoRA(LoRA):
    """W' = m ⊙ (W + ΔW) / ‖W + ΔW‖, row by row; m (out,) trains, and the norm counts as a constant."""

    lora_magnitude_vector: nn.Module  # weight (out,), for convolutions (1, out, 1, …)

    @classmethod
    def check(cls, site: Site, cfg: LoraConfig) -> str | None:
        if site.op.groups(site.module) > 1:
            return "DoRA needs the norm of W + ΔW, and a convolution with groups > 1 has no ΔW: A mixes its groups"
        return super().check(site, cfg)

    @classmethod
    def needs_weight(cls, site: Site, cfg: LoraConfig) -> bool:
        return True

    @classmethod
    def build(cls, site: Site, cfg: LoraConfig, shared, device=None):
        kernel = [1] * (len(site.shape) - 2)
        shape = (1, site.out_features, *kernel) if kernel else (site.out_features,)
        return super().build(site, cfg, shared, device) | dict(
            lora_magnitude_vector=Magnitude(torch.empty(shape, device=device))
        )

    def init(self, cfg: LoraConfig) -> None:
        super().init(cfg)
        if self.layer.weight.is_meta:
            return
        m: Any = self.lora_magnitude_vector.weight
        m.data = self.norm().to(device=self.pair[0].device, dtype=m.dtype).view(m.shape)

    @torch.no_grad()
    def norm(self) -> Tensor:
        """‖W + ΔW‖ per output channel, (out,), of the base weight without what is merged into it."""
        layer = self.layer
        W = layer.op.canon(merging.unmerged(layer)[0]).flatten(1)
        return row_norms(W, *self.factors())

    def ratio(self) -> Tensor:
        """m / ‖W + ΔW‖, (out,)."""
        m = self.lora_magnitude_vector().flatten()
        return m / self.norm().to(m.dtype)

    def join(self, x: Tensor) -> Tensor:
        layer = self.layer
        base = layer.base_layer
        found = plain_factors(layer, self.name) if worth_it(x) else None
        if found is None:
            y = base(x)
            return self.post(x, y).to(y.dtype)
        A, B, scale, p = found
        return decomposed.linear(
            base, layer.op.input_gradient, x, layer.base_weight, layer.bias, A, B, self.ratio(), scale, p
        )

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        """bias + ratio ⊙ (y - bias + ΔW x). Dropout acts on x in both products, and not in y itself.

        The bias is that of the layer as it is by now: adapters that ran before may have shifted it.
        """
        op, base = self.layer.op, self.layer.base_layer
        ratio = op.channels(self.ratio())
        p = 0.0 if op.takes_ids else share_dropped(self.lora_dropout)
        if p != 0:
            kept = self.lora_dropout(x) if p is None else dropout(x, p)
            product = base(kept)
            z = product + self.lora_B(self.lora_A(self.cast(kept))) * self.scaling
            rest, b = y - product, getattr(base, "bias", None)
        elif y.dtype == self.dtype:
            z, rest, b = super().post(x, y), None, self.bias
        else:  # rounds once, at the end
            z, rest, b = y + self.branch(self.cast(x)), None, self.bias
        out = z * ratio
        out = out if b is None else out + op.channels(b) * (1 - ratio)
        return out if rest is None else out + rest

    @property
    def bias(self) -> Tensor | None:
        """The bias in what `post` is given."""
        layer = self.layer
        b = getattr(layer.base_layer, "bias", None)
        if True not in layer.lora_bias.values() or layer.call.current() is not None:
            return b  # in a mixed batch, no row goes through two adapters
        for m in layer._live[: layer._live.index(self)]:
            if m.lora_bias:
                shift = m.lora_B.bias * m.scaling
                b = shift if b is None else b + shift
        return b

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        W, b = super().fold(W, b)
        return W * self.ratio().to(W.dtype).view(-1, *[1] * (W.dim() - 1)), b
