# SPDX-License-Identifier: Apache-2.0
"""SHiRA: Sparse High Rank Adapters, arXiv 2406.13175."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graft.config.fields import require_positive_rank
from graft.config.targets import PHI_ATTENTION
from graft.core.containers import Filed
from graft.core.errors import CheckpointError, ConfigError
from graft.core.merging import lifted
from graft.core.method import Method, Tensors
from graft.kernels.scattered import Scattered
from graft.methods.shira.config import ShiraConfig
from graft.methods.shira.masks import random_mask, random_places


class SHiRA(Method):
    """ΔW = s · v at the places of a mask, 0 elsewhere."""

    config = ShiraConfig
    prefix = "shira_"
    targets = PHI_ATTENTION

    shira_weight: nn.Parameter  # v (k,), in the order of the places
    shira_indices: Tensor  # (2, k) int32: output and input of each, row by row of the weight
    scaling: float

    @property
    def size(self) -> int:
        """The number of entries that train."""
        return int(self.cfg.r) * (self.site.out_features + self.site.fan_in)

    def check(self) -> str | None:
        require_positive_rank(self.cfg.r)
        have = self.site.out_features * self.site.fan_in
        if self.site.op.known and self.size > have:
            raise ConfigError(
                f"The set rank {self.cfg.r} results in more shira params than the total number of params in the base "
                f"layer '{self.site.key}': {self.size} of {have}. Choose a smaller r."
            )
        return super().check()

    def inits_from_weight(self) -> bool:
        return self.cfg.mask_fn not in (None, random_mask)  # which may look at it

    def inits_before_load(self) -> bool:
        return False  # files hold the places

    def build(self, shared: dict[str, Any]) -> dict[str, Any]:
        return dict(
            r=self.cfg.r,
            scaling=1.0,
            shira_weight=nn.Parameter(torch.zeros(self.size)),
            shira_indices=Filed(torch.zeros(2, self.size, dtype=torch.int32)),
        )

    def init(self) -> None:
        if not self.cfg.init_weights:
            nn.init.normal_(self.shira_weight)
        places = self.chosen()
        n = self.site.fan_in
        self.shira_indices.copy_(torch.stack((places // n, places % n)))

    def chosen(self) -> Tensor:
        """Return the places that the mask chooses, in order, (k,)."""
        cfg, layer = self.cfg, self.layer
        if cfg.mask_fn is None:
            raise ConfigError(
                f"Adapter '{self.name}' has no mask: set `mask_fn` of the ShiraConfig, which has mask_type="
                f"{cfg.mask_type!r}, to a function (base_layer, r, **kwargs) → mask."
            )
        if cfg.mask_fn is random_mask:
            return random_places((self.site.out_features, self.site.fan_in), cfg.r, cfg.random_seed)
        with lifted(layer):
            mask = cfg.mask_fn(layer.base_layer, cfg.r)
        wanted = layer.op.uncanon(torch.empty(self.site.shape, device="meta")).shape
        if mask.shape != wanted:
            raise ConfigError(
                f"mask_fn returned a mask of shape {tuple(mask.shape)} for layer '{self.site.key}', whose weight has "
                f"shape {tuple(wanted)}."
            )
        places: Tensor = layer.op.canon(mask).flatten().nonzero().flatten()
        if len(places) != self.size:
            raise ConfigError(
                f"The mask for layer '{self.site.key}' has {len(places)} ones, and r · (in + out) = {self.size} are "
                "to train."
            )
        return places.cpu()

    def delta(self) -> Scattered:
        rows, cols = self.shira_indices.long()
        return Scattered(self.shira_weight * self.scaling, rows * self.site.fan_in + cols, self.site.shape)

    def restored(self, stored: Tensors, cfg: ShiraConfig) -> Tensors:
        """Return the places as int32, which some files hold as floating-point numbers."""
        at = "shira_indices", ""
        if at not in stored:
            return stored
        indices, most = stored[at].to(torch.int32), torch.tensor([self.site.out_features, self.site.fan_in])
        if indices.dim() == 2 and len(indices) == 2 and not ((indices >= 0) & (indices < most[:, None])).all():
            raise CheckpointError(f"shira_indices of layer '{self.site.key}' are outside of its weight.")
        return stored | {at: indices}
