# SPDX-License-Identifier: Apache-2.0
"""VeLoRA: Memory Efficient Training using Rank-1 Sub-Token Projections, arXiv 2405.17991.

LoRA that keeps projections of A's inputs for the backward pass, not the inputs: the gradient of A is approximate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graft.config.fields import require_sub_config
from graft.core.effect import Factors, Product
from graft.kernels.eager import functional
from graft.kernels.low_rank import mean_direction, sketched_product, unit, width
from graft.methods.lora.lora import LoRA


class VeLoRA(LoRA):
    """VeLoRA, arXiv 2405.17991: LoRA that keeps rank-1 projections of A's inputs for the backward pass, so that A's
    gradient is approximate.

    The buffer `lora_velora_embed` (D,) has the direction of the projection: zero until a batch gives it.
    """

    holds_any = False
    only_linear = "VeLoRA projects groups of an input vector: it adapts linear layers only"

    def build(self, shared: dict[str, object], device: torch.device | None = None) -> dict[str, object]:
        """Return LoRA's tensors, the buffer `lora_velora_embed` (D,) of zeros in the default dtype, D = in / num_groups
        (`width`), and `lora_velora_initialized` = False.
        """
        groups = require_sub_config(self.cfg.velora_config).num_groups
        direction = torch.zeros(width(self.site.in_features, groups), device=device)
        return super().build(shared, device) | dict(lora_velora_embed=direction, lora_velora_initialized=False)

    def init_values(self) -> None:
        """Initialise as LoRA.

        With init_type "random", fill the direction with a random unit vector. Other types keep the zeros.
        """
        super().init_values()
        if require_sub_config(self.cfg.velora_config).init_type == "random":
            self.lora_velora_embed.copy_(unit(self.lora_velora_embed.normal_()))

    def factors(self) -> Factors:
        """Return LoRA's factors.

        In training with gradients, outside of functional transforms, A's product is `product`, which keeps less for the
        backward pass.
        """
        f = super().factors()
        if self.layer.training and torch.is_grad_enabled() and not functional():
            return f._replace(A=Product(self.product, self.pair[0]))
        return f

    def product(self, x: Tensor) -> Tensor:
        """Return x Aᵀ, (…, r).

        The backward pass gets only the projections of x onto the direction, in `num_groups` groups, times `scale`.

        `direction` may compute the direction from x and store it in the layer.
        """
        cfg = require_sub_config(self.cfg.velora_config)
        return sketched_product(x, self.pair[0], self.direction(x), cfg.num_groups, cfg.scale)

    @torch.no_grad()
    def direction(self, x: Tensor) -> Tensor:
        """Return the unit vector v (D,) of the projection for a batch x (…, in), without gradient.

        init_type "random", or "batch_average_once" after the first batch: the buffer. Else: the mean direction of x, a
        new tensor in the buffer's dtype, which is also copied into the buffer and marks it as initialised.
        """
        v: Tensor = self.lora_velora_embed
        cfg = require_sub_config(self.cfg.velora_config)
        if cfg.init_type == "random" or (cfg.init_type == "batch_average_once" and self.is_ready()):
            return v
        new = mean_direction(x, cfg.num_groups).to(v.dtype)
        v.copy_(new)
        self.layer.set_facts(self.name, lora_velora_initialized=True)
        return new

    def is_ready(self) -> bool:
        """Return True if a batch or a file has given a direction.

        While the flag is False, look for nonzero values in the buffer, which waits for the device, and store the result
        as the flag.
        """
        if not self.lora_velora_initialized:
            self.layer.set_facts(self.name, lora_velora_initialized=bool(self.lora_velora_embed.any()))
        return bool(self.lora_velora_initialized)
