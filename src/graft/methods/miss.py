# SPDX-License-Identifier: Apache-2.0
"""MiSS: Matrix Shard Sharing, arXiv 2409.15371."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from graft.config.fields import COUNT, LORA, BaseBias, LayerRange, Targeted
from graft.core.effect import Effect, Factors, Rewrite
from graft.core.errors import warn
from graft.core.method import Method, fill_kaiming
from graft.kernels.structured import Repeated, Shards


@dataclass(kw_only=True)
class MissConfig(Targeted, LayerRange, BaseBias):
    """MiSS: all shards of r input features share one block D (r, out): ΔW = [Dᵀ Dᵀ …]."""

    peft_type: str = "MISS"
    r: Annotated[int, COUNT] = 64  # width of a shard
    miss_dropout: float = 0.0
    mini_r: Annotated[int, COUNT] = 1  # for "mini": how many outputs a block has
    init_weights: bool | Literal["bat", "mini"] = True  # a variant; True: plain, False: with a random D

    def __post_init__(self) -> None:
        """Validate the fields; warn that `miss_dropout` does nothing with init_weights="bat"."""
        super().__post_init__()
        if self.init_weights == "bat" and self.miss_dropout:
            warn("miss_dropout has no effect with init_weights='bat', which changes the weight. Set it to 0.")


class MiSS(Method[MissConfig]):
    """MiSS, arXiv 2409.15371: ΔW[o, i] = D[i mod r, o]: a shard sum of the input, times D (r, out)."""

    prefix = "miss_"
    targets = LORA
    facts = ()

    miss_block: nn.Parameter  # (r, out); of MiniMiSS (r, mini_r), of BatMiSS (out / r, r, r)
    miss_dropout: nn.Module

    @classmethod
    def variant(cls, cfg: MissConfig) -> type[Method]:
        """Return BatMiSS for init_weights="bat", MiniMiSS for "mini", else `cls`."""
        return {"bat": BatMiSS, "mini": MiniMiSS}.get(cfg.init_weights, cls)  # type: ignore[arg-type]

    def check(self) -> str | None:
        """Return the reason of `Method.check`, or, only if that is None, that r is above fan_in."""
        why = super().check()
        if why is None and self.cfg.r > self.site.fan_in:
            return f"`r` ({self.cfg.r}) must be less than or equal to in_features ({self.site.fan_in})"
        return why

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return the parameter `miss_block` of zeros in `shape`, and the facts `miss_r` and `miss_mini_r`.
        Floating-point tensors are made on the default device, in the default dtype.
        """
        block = nn.Parameter(torch.zeros(self.shape))
        return dict(miss_r=self.cfg.r, miss_mini_r=self.cfg.mini_r, miss_block=block)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the block D: (r, out)."""
        return self.cfg.r, self.site.out_features

    def init_values(self) -> None:
        """Keep D at zero; with `init_weights=False` fill it kaiming uniform (a=√5)."""
        if self.cfg.init_weights is False:
            fill_kaiming(self.miss_block)

    def factors(self) -> Factors:
        """Return factors with dropout: A sums the shards of the input, (r, fan_in), B repeats Dᵀ to (out, r).

        On layers that take vectors both are products that form no matrix, else matrices.
        """
        A = Shards(self.cfg.r, self.site.fan_in, self.miss_block)
        B = Repeated(self.miss_block, self.site.out_features // self.miss_block.shape[1])
        if not self.site.multiplies_vectors:  # the layer takes matrices
            return Factors(A.weight, B.weight, dropout=self.miss_dropout)
        return Factors(A, B, dropout=self.miss_dropout)


class MiniMiSS(MiSS):
    """MiSS with a D that repeats a block of few outputs."""

    def check(self) -> str | None:
        """Return the reason of `MiSS.check`, or that `mini_r` does not divide out_features."""
        out, mini_r = self.site.out_features, self.cfg.mini_r
        return super().check() or (
            f"out_features ({out}) must be divisible by `mini_r` ({mini_r})" if out % mini_r else None
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the block D: (r, mini_r)."""
        return self.cfg.r, self.cfg.mini_r


class BatMiSS(MiSS):
    """MiSS on blocks (r, r) of the weight: W_mn becomes W_mn + W_mn D_m + D_m."""

    def check(self) -> str | None:
        """Return the reason of `MiSS.check`, or that r does not divide both in_features and out_features."""
        out, fan_in, r = self.site.out_features, self.site.fan_in, self.cfg.r
        return super().check() or (
            f"in_features ({fan_in}) and out_features ({out}) must be divisible by `r` ({r}): the weight consists of "
            "[r, r] blocks"
            if out % r or fan_in % r
            else None
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of D: (out / r, r, r), a matrix for each row of blocks."""
        return self.site.out_features // self.cfg.r, self.cfg.r, self.cfg.r

    def describe(self) -> Effect:
        """Return a `Rewrite` by `fold` only, which needs the weight in every call."""
        # no Update of W₀: as in PEFT, the second of two adapters acts on the weight that the first made
        return Rewrite(self.fold)

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weight with each block W_mn (r, r) replaced by W_mn + W_mn D_m + D_m, and the bias unchanged.

        D is cast to W's dtype.
        """
        D = self.miss_block.to(W.dtype)
        blocks = W.reshape(len(D), -1, self.cfg.r)  # (m, rows of every n, r)
        new = torch.baddbmm(blocks, blocks, D).view(len(D), self.cfg.r, -1, self.cfg.r) + D[:, :, None]
        return new.view(W.shape), b
