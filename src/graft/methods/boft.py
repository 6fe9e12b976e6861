# SPDX-License-Identifier: Apache-2.0
"""BOFT: Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization, arXiv 2311.06243."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from graft.config.fields import LORA, POSITIVE, BaseBias, FanInFanOut, LayerRange, Targeted
from graft.core.containers import Transient
from graft.core.effect import Effect, Rewrite
from graft.core.errors import ConfigError
from graft.core.method import Method
from graft.kernels.orthogonal import butterfly, butterfly_order, orthogonal


@dataclass(kw_only=True)
class BOFTConfig(Targeted, LayerRange, FanInFanOut, BaseBias):
    """BOFT: s ⊙ W (x R), R a product of butterfly factors. Give either the block size or the number of blocks."""

    peft_type: str = "BOFT"
    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: Annotated[int, POSITIVE] = 1  # 1: R is block-diagonal
    boft_dropout: float = 0.0  # replaces blocks of one factor by the identity in training
    init_weights: bool = True

    def __post_init__(self) -> None:
        """Validate the fields; raise ConfigError unless exactly one of `boft_block_size` and `boft_block_num` is
        nonzero, and none is negative.
        """
        super().__post_init__()
        size, blocks = self.boft_block_size, self.boft_block_num
        if (size == 0) == (blocks == 0) or size < 0 or blocks < 0:
            raise ConfigError(
                f"Either `boft_block_size` ({size}) or `boft_block_num` ({blocks}) must be non-zero, and not both. Set "
                "the one that does not apply to 0."
            )


class BOFT(Method[BOFTConfig]):
    """BOFT, arXiv 2311.06243: s ⊙ W (x R) + b, R = R_F … R_1, R_i = P_i blockdiag((I - S)(I + S)⁻¹) P_iᵀ.

    In convolutions R turns the weight, of embeddings the output.
    """

    prefix = "boft_"
    targets = LORA
    files = {"boft_P": ""}  # the permutations, in files of PEFT before 0.13

    boft_R: nn.Parameter  # (F, blocks, b, b); S is its skew-symmetric part
    boft_s: nn.Parameter  # (out, 1), of convolutions (1, out)
    boft_orders: Tensor  # (F, 2, n): P_i and its inverse as indices

    def describe(self) -> Effect:
        """Return a `Rewrite` by `fold`: on linear layers `pre` rotates the input, and `post` scales the output without
        its bias (`apart`).

        On embeddings `post` rotates and scales the output; on convolutions only the weight changes.
        """
        if self.site.op.takes_ids:
            return Rewrite(self.fold, post=self.post)
        if len(self.site.shape) > 2:  # overlapping patches: turn the weight
            return Rewrite(self.fold)
        return Rewrite(self.fold, pre=self.pre, post=self.post, apart=True)

    @property
    def width(self) -> int:
        """The number n of channels that R turns: out_features of an embedding, else fan_in."""
        return self.site.out_features if self.site.op.takes_ids else self.site.fan_in

    @property
    def blocks(self) -> int:
        """The number of blocks: `boft_block_num`, or width // `boft_block_size`."""
        return int(self.cfg.boft_block_num or self.width // self.cfg.boft_block_size)

    def check(self) -> str | None:
        """Return the reason of `Method.check`.

        If that is None, raises ConfigError when the width does not have these blocks and factors (`unfit`).
        """
        why = super().check()
        if why is None and (wrong := unfit(self.width, self.cfg)):
            raise ConfigError(f"{wrong} (layer '{self.site.key}'). Choose other blocks, or do not target this layer.")
        return why

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return uninitialised parameters `boft_R` (F, blocks, b, b) and `boft_s` (out, 1), of a convolution (1, out).

        Also `boft_block_size` and `boft_block_num` of this layer, and the config's `boft_dropout`.

        With F > 1 also the buffer `boft_orders` (F, 2, n), which no file holds: each factor's permutation and its
        inverse. Floating-point tensors are made on the default device, in the default dtype.
        """
        cfg, n, blocks = self.cfg, self.width, self.blocks
        F, b, out = cfg.boft_n_butterfly_factor, n // blocks, self.site.out_features
        values = dict(
            boft_block_size=b,
            boft_block_num=blocks,
            boft_dropout=cfg.boft_dropout,
            boft_R=nn.Parameter(torch.empty(F, blocks, b, b)),
            boft_s=nn.Parameter(torch.empty((1, out) if len(self.site.shape) > 2 else (out, 1))),
        )
        if F == 1:
            return values
        orders = [butterfly_order(n, b, level) for level in range(F)]
        return values | dict(boft_orders=Transient(torch.stack([torch.stack((o, o.argsort())) for o in orders])))

    def init_values(self) -> None:
        """Fill R with zeros and s with ones, the identity; with `init_weights=False` normal values of std 0.1 around 0
        and 1.
        """
        self.fill_start(self.boft_R, 0.1)
        self.fill_start(self.boft_s, 0.1, mean=1.0)

    def R(self) -> Tensor:
        """Return the orthogonal blocks of all factors, (F, blocks, b, b), in at least float32.

        In training with dropout, ⌊dropout · blocks⌋ random blocks of one random factor are the identity.
        """
        B = self.boft_R.to(torch.promote_types(self.boft_R.dtype, torch.float32))  # solvers have no half precision
        F, D, b, _ = B.shape
        S = (B - B.mT) / 2
        R: Tensor = orthogonal(S.flatten(0, 1), None).view(B.shape)
        if self.cfg.boft_dropout and self.layer.training:
            chosen = torch.randperm(D, device=B.device) >= D - int(self.cfg.boft_dropout * D)
            level = torch.arange(F, device=B.device) == torch.randint(F, (), device=B.device)
            R = torch.where((level[:, None] & chosen)[..., None, None], torch.eye(b, device=B.device, dtype=B.dtype), R)
        return R

    def rotate_blocks(self, x: Tensor, dtype: torch.dtype, transpose: bool = False) -> Tensor:
        """Return x R, or with `transpose` x Rᵀ, in x's dtype, computed in `dtype`. x (…, n); R is drawn anew in
        training with dropout.
        """
        orders = self.boft_orders if self.cfg.boft_n_butterfly_factor > 1 else None
        return butterfly(x, self.R().to(dtype), orders, transpose)

    def pre(self, x: Tensor) -> Tensor:
        """Return the input times R, in the input's dtype, computed in the adapter's."""
        return self.rotate_blocks(x, self.dtype)

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y ⊙ s; of an embedding y R ⊙ s. x is not read, and s is not cast: the wider dtype counts."""
        if self.site.op.takes_ids:
            y = self.rotate_blocks(y, self.dtype)
        return y * self.boft_s.flatten()

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return s ⊙ (W Rᵀ) in W's shape, with W as a matrix (out, fan_in), and the bias unchanged.

        R and s are cast to W's dtype.

        Of an embedding, R and s act on the columns that are looked up.
        """
        s = self.boft_s.flatten().to(W.dtype)
        if self.site.op.takes_ids:  # R turns the columns, which a call looks up
            return (self.rotate_blocks(W.T, W.dtype) * s).T, b
        turned = self.rotate_blocks(W.flatten(1), W.dtype, transpose=True)
        return (turned * s[:, None]).view(W.shape), b


def unfit(n: int, cfg: BOFTConfig) -> str | None:
    """Return the reason why n channels do not fit the config's blocks and factors; None if they do.

    `boft_block_num`, if it is not 0, else `boft_block_size`, must divide n; it gives the other one. With F > 1 factors,
    size and number must be even, and the number at least 2^(F - 1). Block size · 2^(F - 1) must divide n.
    """
    size, blocks, F = cfg.boft_block_size, cfg.boft_block_num, cfg.boft_n_butterfly_factor
    name, number = ("boft_block_num", blocks) if blocks else ("boft_block_size", size)
    if n % number:
        return f"in_features ({n}) must be divisible by {name} ({number})"
    blocks = blocks or n // size
    size = n // blocks
    if F > 1 and (size % 2 or blocks % 2):
        return f"With several butterfly factors, block size ({size}) and number of blocks ({blocks}) must be even"
    if n % (size << F - 1) or (F > 1 and math.log2(blocks) < F - 1):
        return f"boft_n_butterfly_factor ({F}) is too large for {blocks} blocks of size {size}"
    return None
