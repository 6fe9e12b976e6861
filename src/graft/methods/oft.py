# SPDX-License-Identifier: Apache-2.0
"""OFT: Controlling Text-to-Image Diffusion by Orthogonal Finetuning, arXiv 2306.07280; OFTv2, arXiv 2506.19847."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from graft.config.bounds import must_be
from graft.config.fields import LORA, NOT_NEGATIVE, BaseBias, FanInFanOut, LayerRange, Targeted
from graft.core.effect import Effect, Rewrite
from graft.core.errors import ConfigError, warn, warn_of_layer
from graft.core.method import Method
from graft.kernels.orthogonal import constrain_in_backward, orthogonal, rotate, skew

# of the Cayley-Neumann series
TERMS = must_be("a positive integer, at most 1000", lambda number: 1 <= number <= 1000)


@dataclass(kw_only=True)
class OFTConfig(Targeted, LayerRange, FanInFanOut, BaseBias):
    """OFT: W (x R), R = blockdiag(R_1, …) of orthogonal blocks. Give either the block size or the number of blocks."""

    peft_type: str = "OFT"
    r: int = 0  # number of blocks
    oft_block_size: int = 32
    module_dropout: float = 0.0  # replaces blocks by the identity in training
    init_weights: bool = True
    coft: bool = False  # constrained: Q stays within eps of 0
    eps: Annotated[float, NOT_NEGATIVE] = 6e-5
    block_share: bool = False  # one block, used throughout
    use_cayley_neumann: bool = True  # a power series in place of the exact Cayley transform
    num_cayley_neumann_terms: Annotated[int, TERMS] = 5

    def __post_init__(self) -> None:
        """Validate the fields; raise ConfigError unless exactly one of `r` and `oft_block_size` is nonzero, and none is
        negative.
        """
        super().__post_init__()
        if (self.r == 0) == (self.oft_block_size == 0) or self.r < 0 or self.oft_block_size < 0:
            raise ConfigError(
                f"Either `r` or `oft_block_size` must be non-zero, and not both: r={self.r}, "
                f"oft_block_size={self.oft_block_size}. Set the one that does not apply to 0."
            )

    @classmethod
    def check_kwargs(cls, **kwargs: object) -> dict[str, object]:
        """Return a file's fields unchanged.

        Warn if the file uses the Cayley-Neumann series and is older than PEFT 0.18 by the first two numbers of
        `peft_version`; that release changed the series. A file without `peft_version` counts as older.

        Raises:
            ConfigError: `oft_block_size` is missing: the file is older than PEFT 0.14, with another OFT.
        """
        if "oft_block_size" not in kwargs:
            raise ConfigError("OFT has been updated since PEFT 0.14.0: this checkpoint is older, retrain it.")
        version = tuple(int(p[:9]) for p in str(kwargs.get("peft_version") or "0").split(".")[:2] if p.isdecimal())
        if kwargs.get("use_cayley_neumann") and version < (0, 18):
            warn("The Cayley-Neumann series changed in PEFT 0.18.0: outputs will differ from training.")
        return kwargs


class Rotation(nn.Module):
    """Skew-symmetric blocks Q, each as its strict upper triangle."""

    def __init__(self, blocks: int, size: int):
        """Make an uninitialised parameter `weight` (blocks, size (size - 1) / 2)."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, size * (size - 1) // 2))


class OFT(Method[OFTConfig]):
    """OFT, arXiv 2306.07280: W (x R), R per block (I - Q)(I + Q)⁻¹ or the series of its inverse.

    In convolutions, R rotates the weight.
    """

    prefix = "oft_"
    targets = LORA
    facts = ("module_dropout",)

    oft_R: Rotation  # weight (blocks, b (b - 1) / 2)
    oft_embedding_R: Rotation
    block_size: int
    blocks: int  # number of blocks in R; if they share one, `oft_R` has only that
    eps: float | None
    terms: int
    module_dropout: float

    def describe(self) -> Effect:
        """Return a `Rewrite` by `fold`: `pre` rotates the input; of a convolution only the weight is rotated; of an
        embedding `post` rotates the output.

        Of several active adapters on a layer that is no embedding, each acts inside the ones after it (`inward`).
        """
        if self.site.op.takes_ids:
            return Rewrite(self.fold, post=self.post)
        kernel = len(self.site.shape) > 2  # overlapping patches: rotate the weight
        return Rewrite(self.fold, pre=None if kernel else self.pre, inward=True)

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return `oft_R` (on an embedding `oft_embedding_R`), a `Rotation` of all blocks, or of one with `block_share`,
        and the facts. The facts are `r` and `blocks` (both the number of blocks), `block_size`, `eps` and `terms`.

        The blocks divide the inputs, of an embedding the outputs. `r`, or for 0 `oft_block_size`, that does not divide
        them becomes the nearest divisor, with a warning. `eps` is None without `coft`, `terms` None without
        `use_cayley_neumann`. Floating-point tensors are made on the default device, in the default dtype.
        """
        site, cfg = self.site, self.cfg
        n = site.out_features if site.op.takes_ids else site.fan_in
        what = "r" if cfg.r else "oft_block_size"
        wanted = getattr(cfg, what)
        fitting = nearest_divisor(n, wanted)
        if fitting != wanted:
            warn_of_layer(site.key, f"Invalid `{what}` ({wanted}) for {{}}: adjusted to ({fitting}).")
        size = n // fitting if cfg.r else fitting
        return {
            "oft_embedding_R" if site.op.takes_ids else "oft_R": Rotation(1 if cfg.block_share else n // size, size),
            "r": n // size,  # as PEFT counts the blocks
            "block_size": size,
            "blocks": n // size,
            "eps": cfg.eps if cfg.coft else None,
            "terms": cfg.num_cayley_neumann_terms if cfg.use_cayley_neumann else None,
        }

    def init_values(self) -> None:
        """Fill the rotation's weight with zeros, so that R = I; with `init_weights=False` with normal values of std
        0.1.
        """
        self.fill_start(self.rotation.weight, 0.1)

    @property
    def rotation(self) -> Rotation:
        """The `Rotation` of this layer: `oft_embedding_R` on an embedding, else `oft_R`."""
        return self.oft_embedding_R if self.site.op.takes_ids else self.oft_R

    def R(self) -> Tensor:
        """Return the orthogonal blocks of R, (blocks, b, b), or (1, b, b) if they share one, in at least float32.

        With `coft` the parameters are constrained to `eps` in the backward pass. In training each block is the identity
        with the probability `module_dropout`.
        """
        v: Tensor = self.rotation.weight
        if self.eps is not None:
            v = constrain_in_backward(v, self.eps)
        wide = torch.promote_types(v.dtype, torch.float32)  # solvers have no half precision
        R = orthogonal(skew(v.to(wide), self.block_size), self.terms)
        if self.module_dropout and self.layer.training:
            dropped = torch.rand(R.shape[0], 1, 1, device=R.device) < self.module_dropout
            R = torch.where(dropped, torch.eye(self.block_size, device=R.device, dtype=R.dtype), R)
        return R

    def pre(self, x: Tensor) -> Tensor:
        """Return the input times R, block by block, in the input's dtype, computed in the adapter's."""
        return self.rotate(x)

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the output y times R, block by block, in y's dtype, computed in the adapter's; for embeddings. x is
        not read.
        """
        return self.rotate(y)

    def rotate(self, x: Tensor) -> Tensor:
        """Return x R, block by block, in x's dtype, computed in the adapter's. x (…, n); one shared block acts on all
        parts.
        """
        return rotate(x, self.R().to(self.dtype).expand(self.blocks, -1, -1))

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return W Rᵀ block by block, in W's shape, so that W' x = W (x R).

        Of an embedding return Rᵀ W, as R rotates its output.

        R is cast to W's dtype. The bias is unchanged.
        """
        R = self.R().to(W.dtype)
        if self.site.op.takes_ids:  # R rotates the output: Rᵀ W
            blocks = W.reshape(self.blocks, self.block_size, -1)
            return (R.mT @ blocks).reshape(W.shape), b
        blocks = W.reshape(W.shape[0], self.blocks, self.block_size, 1)
        return (R @ blocks).reshape(W.shape), b


def nearest_divisor(n: int, wanted: int) -> int:
    """Return the divisor of n nearest to `wanted`, the smaller of two equally near; n itself if `wanted` ≥ n, 1 for 1
    or less.
    """
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: (abs(d - wanted), d)) if wanted < n else n
