# SPDX-License-Identifier: Apache-2.0
"""BD-LoRA: Block-Diagonal LoRA, arXiv 2510.23346. A or B is block-diagonal, so that devices of a server share it out.

Block k of a factor (m, n) has rows k m / nb … and columns k n / nb …; the blocks are kept one below the other.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn

from graft.config.fields import require_sub_config
from graft.core.effect import Compact, Factors
from graft.core.errors import ConfigError
from graft.core.random import skip_draws
from graft.methods.lora import checks
from graft.methods.lora.lora import LoRA


class BlockDiagonal(nn.Module):
    """The product with a block-diagonal matrix (out_features, in_features); `weight` (out_features, in_features /
    nblocks) holds the blocks one below the other.
    """

    def __init__(self, in_features: int, out_features: int, nblocks: int, device: torch.device | None = None):
        """Make an uninitialised parameter `weight` (out_features, in_features // nblocks)."""
        super().__init__()
        self.in_features, self.out_features, self.nblocks = in_features, out_features, nblocks
        self.weight = nn.Parameter(torch.empty(out_features, in_features // nblocks, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Split x (…, in_features) into `nblocks` parts, multiply each with its block, and return them joined, (…,
        out_features). No bias is added.
        """
        blocks = self.weight.view(self.nblocks, -1, self.weight.shape[1])
        return torch.einsum("...kn,kmn->...km", x.unflatten(-1, (self.nblocks, -1)), blocks).flatten(-2)

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the whole matrix (out, in), zero outside of the blocks, from a weight (out, in / nblocks)."""
        return torch.block_diag(*weight.chunk(self.nblocks))

    def extra_repr(self) -> str:
        """Return the two sizes and the number of blocks for `repr`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, nblocks={self.nblocks}"


class BdLoRA(LoRA):
    """BD-LoRA, arXiv 2510.23346: LoRA with a block-diagonal A or B (`side`); plain LoRA on layers of neither list."""

    holds_any = False

    @cached_property
    def side(self) -> str:
        """Return the block-diagonal factor here: "A" or "B", if the site's path contains a string of
        `target_modules_bd_a` or `_b`; "AB" for both, "" for none. It is read at the first access and kept.
        """
        cfg, key = require_sub_config(self.cfg.use_bdlora), self.site.key
        patterns = {"A": cfg.target_modules_bd_a or (), "B": cfg.target_modules_bd_b or ()}
        return "".join(side for side, parts in patterns.items() if any(part in key for part in parts))

    def check(self) -> str | None:
        """Return the reason against blocks on a layer that is not linear, or a reason of `LoRA.check`; None if the
        layer can be adapted.

        The errors of the path come first. A path in neither list, without `match_strict`, is only checked by
        `LoRA.check`. Then come the layer's kind, the other errors in this order, and `LoRA.check`.

        Raises:
            ConfigError: the path fits both lists, or neither with `match_strict`.
            ConfigError: the initialisation needs plain shapes (`checks.plain_start`).
            ConfigError: `nblocks` does not divide r and the width of the blocked factor (A's input, B's output), or
                `lora_bias` has a block-diagonal B.
        """
        site, side, cfg = self.site, self.side, require_sub_config(self.cfg.use_bdlora)
        if side == "AB":
            raise ConfigError(f"Target {site.key} matches both A and B block-diagonal patterns. Take it out of one.")
        if not side and cfg.match_strict:
            raise ConfigError(
                f"Target {site.key} matches neither A nor B block-diagonal patterns. If this is intentional, set "
                "match_strict=False in BdLoraConfig."
            )
        why = side and checks.only_linear(site, "BD-LoRA's blocks are of the features of linear layers")
        if why or not side:
            return why or super().check()
        checks.plain_start(site, self.cfg, "use_bdlora")
        width = site.in_features if side == "A" else site.out_features
        if width % cfg.nblocks or self.cfg.r % cfg.nblocks:
            raise ConfigError(
                f"{side} of layer '{site.key}' has sizes {width} and r={self.cfg.r}, not divisible by {cfg.nblocks} "
                "(nblocks). Choose another nblocks."
            )
        if side == "B" and self.cfg.lora_bias:
            raise ConfigError(f"The block-diagonal B of layer '{site.key}' has no bias. Leave lora_bias off.")
        return super().check()

    def build(self, shared: dict[str, object], device: torch.device | None = None) -> dict[str, object]:
        """Return LoRA's tensors, with `lora_A` (side A) or `lora_B` (side B) replaced by a `BlockDiagonal` of
        `nblocks`.
        """
        values, site = super().build(shared, device), self.site
        r, n = self.cfg.r, require_sub_config(self.cfg.use_bdlora).nblocks
        if self.side == "A":
            values["lora_A"] = BlockDiagonal(site.in_features, r, n, device)
        elif self.side == "B":
            values["lora_B"] = BlockDiagonal(r, site.out_features, n, device)
        return values

    def init_values(self) -> None:
        """Initialise as LoRA, then fill the block-diagonal factor again: A kaiming uniform (a=0), B zeros.

        With init_lora_weights=True and side A the generator also advances as far as for a whole A, as in PEFT.
        """
        super().init_values()
        A, B = self.pair
        if self.side == "A":
            if self.cfg.init_lora_weights is True:  # as if all of A had been drawn before, which PEFT does
                skip_draws(torch.empty(self.cfg.r, self.site.in_features - A.shape[1]))
            nn.init.kaiming_uniform_(A)
        elif self.side == "B":
            nn.init.zeros_(B)

    def factors(self) -> Factors:
        """Return LoRA's factors, with the block-diagonal one as a `Compact`, which forms its whole matrix on demand.

        Unchanged where neither is blocked.
        """
        f = super().factors()
        if self.side == "A":
            return f._replace(A=Compact(self.lora_A, self.lora_A.matrix))
        return f._replace(B=Compact(self.lora_B, self.lora_B.matrix)) if self.side else f
