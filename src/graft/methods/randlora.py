# SPDX-License-Identifier: Apache-2.0
"""RandLoRA: Full-rank parameter-efficient fine-tuning of large models, arXiv 2502.00987."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graft.config.fields import LORA, BaseBias
from graft.core.effect import Factors
from graft.core.method import AdaptedLayers, Method, PublishedRate
from graft.core.random import kaiming_bound
from graft.kernels.structured import between_diagonals
from graft.kernels.waits import copy_on_device
from graft.methods.projections import DRAWN, ProjectionConfig, check_wide, maybe_transient


@dataclass(kw_only=True)
class RandLoraConfig(ProjectionConfig, BaseBias):
    """RandLoRA: a sum of random products of rank r, as many as give full rank, with trained diagonals between them."""

    peft_type: str = "RANDLORA"
    r: int = 32  # of each product: the more, the fewer there are, and the fewer numbers train
    sparse: bool = False  # A and B of -1, 0 and 1, two thirds of them 0
    very_sparse: bool = False  # the same, with more zeros: all but 1/√d, d the smaller width of the widest layer
    randlora_dropout: float = 0.0
    randlora_alpha: int = 640  # ΔW has the factor randlora_alpha / r
    init_weights: bool = True  # λ is 0; else random

    matrices = "randlora_A and randlora_B"


class RandLoRA(Method[RandLoraConfig]):
    """RandLoRA, arXiv 2502.00987: ΔW = s Σₙ Bₙ diag(λₙ) A diag(γₙ), transposed where out < in.

    d is the smaller of in and out, D the other.
    """

    prefix = "randlora_"
    published_lr = PublishedRate(1e-4, 1e-4, "arXiv 2502.00987, its code, commonsense reasoning")
    targets = LORA
    agreeing_fields = (*DRAWN, "sparse", "very_sparse")

    randlora_lambda: nn.Parameter  # (r, n), n = ⌈d / r⌉
    randlora_gamma: nn.Parameter  # (n, d)
    randlora_A: Tensor  # (r, 1, largest d), shared
    randlora_B: Tensor  # (largest D, largest n, r), shared
    randlora_dropout: nn.Module
    scaling: float

    @classmethod
    def share(cls, layers: AdaptedLayers) -> dict[str, object]:
        """Return the shared random matrices `randlora_A` (r, 1, d) and `randlora_B` (D, ⌈d / r⌉, r).

        d is the smaller, D the larger of the widest input and output over all layers. They are drawn by `ternary` with
        `sparse` or `very_sparse`, by `uniform` otherwise. If another adapter shares the matrices, return those of the
        first one instead. With `save_projection=False` of this config no file holds them; the first adapter's are then
        marked so, too.

        Raises:
            ConfigError: the first adapter's matrices are too small. A needs the largest smaller size of a single layer,
                B the largest larger size; A is checked first.
        """
        cfg, existing = layers.cfg, layers.existing
        sizes = [sorted((s.out_features, s.fan_in)) for s in layers.sites]
        d, D = max(size[0] for size in sizes), max(size[1] for size in sizes)
        if existing and layers.other_configs:
            A, B = (existing[f"randlora_{x}"][next(iter(layers.other_configs))] for x in "AB")
            check_wide("randlora_A", A.shape[2], d)
            check_wide("randlora_B", B.shape[0], D)
        else:
            wide = sorted((layers.max_out_features, layers.max_fan_in))  # as PEFT sizes them
            A, B = (ternary if cfg.sparse or cfg.very_sparse else uniform)(cfg, *wide)
        return {f"randlora_{x}": maybe_transient(M, cfg.save_projection) for x, M in (("A", A), ("B", B))}

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The number n = ⌈d / r⌉ of products, the smaller width d of the layer, and the larger D."""
        d, D = sorted((self.site.out_features, self.site.fan_in))
        return -(-d // self.cfg.r), d, D

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return the shared matrices, `randlora_lambda` (r, n) of normal values, `randlora_gamma` (n, d) of ones, both
        trained, and scaling = alpha / r. Floating-point
        tensors are made on the default device, in the default dtype.
        """
        cfg, (n, d, _) = self.cfg, self.sizes
        return shared | dict(
            scaling=cfg.randlora_alpha / cfg.r,
            randlora_lambda=nn.Parameter(torch.randn(cfg.r, n)),
            randlora_gamma=nn.Parameter(torch.ones(n, d)),
        )

    def init_values(self) -> None:
        """Fill γ with 1 / max(n, d) and λ with zeros.

        With `init_weights=False` γ is 1 / D, and λ keeps its normal values.
        """
        n, d, D = self.sizes
        nn.init.constant_(self.randlora_gamma, 1 / max(n, d) if self.cfg.init_weights else 1 / D)
        if self.cfg.init_weights:
            nn.init.zeros_(self.randlora_lambda)

    def factors(self) -> Factors:
        """Return factors of rank n · r with scaling and dropout.

        The small one is A between λ and γ, (n r, d), the large one B, (D, n r).

        If d is the input, A is the small and B the large one; else both are exchanged and transposed. The shared
        matrices are copied to γ's device and dtype.
        """
        n, d, D = self.sizes
        # λ is stored by rank, γ by product: PEFT pairs both in the order of storage
        gamma = self.randlora_gamma
        A, B = copy_on_device(self.randlora_A, gamma.device), copy_on_device(self.randlora_B, gamma.device)
        dtype = gamma.dtype  # FSDP casts parameters for a call, and leaves buffers as they are
        small = between_diagonals(self.randlora_lambda, A[:, 0, :d].to(dtype), gamma)
        large = B[:D, :n].flatten(1).to(dtype)
        A, B = (small, large) if self.site.fan_in == d else (large.T, small.T)
        return Factors(A, B, scale=self.scaling, dropout=self.randlora_dropout)


def uniform(cfg: RandLoraConfig, d: int, D: int) -> tuple[Tensor, Tensor]:
    """Draw A (r, 1, d) and B (D, n, r), n = ⌈d / r⌉, uniform in bfloat16 within ±1/√(last size), from the seed
    `projection_prng_key`. B is drawn in n parts (D, 1, r), as in PEFT.

    Return both in float32, divided by their standard deviation. On the meta device nothing is drawn.
    """
    n, r = -(-d // cfg.r), cfg.r
    generator = torch.Generator("cpu").manual_seed(cfg.projection_prng_key)
    A, *parts = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((r, 1, d), *[(D, 1, r)] * n))
    for t in (A, *parts):
        bound = kaiming_bound(t.shape[-1])
        if not t.is_meta:
            t.uniform_(-bound, bound, generator=generator)
    B = torch.cat(parts, 1)
    return (A / A.std()).float(), (B / B.std()).float()


def ternary(cfg: RandLoraConfig, d: int, D: int) -> tuple[Tensor, Tensor]:
    """Draw A (r, 1, d) and B (D, ⌈d / r⌉, r) with values -1, 0, 1, from the seed `projection_prng_key`, divided by
    their standard deviation.

    A third of the values is not 0; with `very_sparse` 1/√d of them. On the meta device nothing is drawn.
    """
    share = 1 / (2 * (d**0.5 if cfg.very_sparse else 3))  # of the values below 0
    generator = torch.Generator("cpu").manual_seed(cfg.projection_prng_key)
    matrices = []
    for shape in ((cfg.r, 1, d), (D, -(-d // cfg.r), cfg.r)):
        t = torch.empty(shape)
        if not t.is_meta:
            t.uniform_(generator=generator)
        t = (t > 1 - share).float() - (t < share).float()
        matrices.append(t / t.std())
    return matrices[0], matrices[1]
