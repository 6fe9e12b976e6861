# SPDX-License-Identifier: Apache-2.0
"""PVeRA: Probabilistic Vector-Based Random Matrix Adaptation, arXiv 2512.07703."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graft.config.fields import PVERA, BaseBias
from graft.core.effect import Factors, Product
from graft.core.method import COMPARISON, PublishedRate
from graft.core.site import Site
from graft.kernels.eager import cast, eager
from graft.kernels.low_rank import new_seed, sample_hidden
from graft.kernels.waits import copy_on_device
from graft.methods.projections import Projected, ProjectionConfig


@dataclass(kw_only=True)
class PveraConfig(ProjectionConfig, BaseBias):
    """PVeRA: VeRA with random hidden values in training; their mean and variance depend on the input."""

    peft_type: str = "PVERA"
    r: int = 256
    pvera_dropout: float = 0.0
    d_initial: float = 0.1  # of λ_d
    init_weights: bool = True  # λ_b begins as zeros
    sample_at_inference: bool = False  # be random there, too; merged weights have the means
    generator_seed: int | None = None  # of a generator for each layer; None: torch's. Compiled code takes torch's

    matrices = "pvera_A and pvera_B"
    counters = ("projection_prng_key", "generator_seed")


KEPT = 16  # runs of a layer that may still have a backward pass


class PVeRA(Projected[PveraConfig]):
    """PVeRA, arXiv 2512.07703: (μ, log σ²) = λ_d ⊙ A x; y += λ_b ⊙ B (μ + ε σ), ε ~ N(0, 1).

    Without ε this is ΔW = diag(λ_b) B diag(λ_d) A.
    """

    prefix = "pvera_lambda_"
    published_lr = PublishedRate(3e-3, 3e-3, COMPARISON)
    targets = PVERA
    multiple = 2
    ungrouped = "PVeRA draws one value for all inputs of a place, and a convolution with groups > 1 separates them"

    pvera_lambda_b: nn.Parameter  # (out,)
    pvera_lambda_d: nn.Parameter  # (2 r,), of means, then of variances
    pvera_A: Tensor  # (2 r, widest in), shared
    pvera_B: Tensor  # (widest out, r), shared
    pvera_dropout: nn.Module

    def __init__(self, site: Site, cfg: PveraConfig, name: str):
        """Set up the method without a generator; `noise` makes one from `generator_seed`.

        Start an empty table of the generator's states.
        """
        super().__init__(site, cfg, name)
        self.generator: torch.Generator | None = None
        self.before: dict[int, Tensor] = {}  # the generator's states before the last draws, by ticket

    def factors(self) -> Factors:
        """Return factors of the means (first r rows of A), with λ_d as `inner`, λ_b as `outer`, with dropout.

        In training, or with `sample_at_inference`, the product with A is `sample`: random hidden values. A and B are
        copied to λ_d's device and dtype.
        """
        r, d, b = self.cfg.r, self.pvera_lambda_d, self.pvera_lambda_b
        A, B = copy_on_device(self.pvera_A, d.device), copy_on_device(self.pvera_B, d.device)
        A, B = A[:, : self.site.fan_in], B[: self.site.out_features]
        A, B = A.to(d.dtype), B.to(d.dtype)  # FSDP casts parameters for a call, and leaves buffers as they are
        if not (self.layer.training or self.cfg.sample_at_inference):
            return Factors(A[:r], B, dropout=self.pvera_dropout, inner=d[:r], outer=b)
        return Factors(Product(self.sample, lambda: d[:r, None] * A[:r]), B, dropout=self.pvera_dropout, outer=b)

    def sample(self, x: Tensor) -> Tensor:
        """Return μ + ε σ, r channels, for an input x after dropout: (μ, log σ²) = λ_d ⊙ A x, first the r means.

        A x takes A's first fan_in columns; ε is from `noise`. The result is in the wider dtype of A x and λ_d.
        """
        op, d = self.site.op, self.pvera_lambda_d
        A = copy_on_device(self.pvera_A, d.device)[:, : self.site.fan_in]
        x = self.cast(x)
        h = op.down(self.layer.base_layer, x, A.to(d.dtype if op.takes_ids else x.dtype))
        h = cast(h, torch.promote_types(h.dtype, d.dtype))
        if op.linear:
            return sample_hidden(h, d, self.noise(h[..., : self.cfg.r]))
        mean, log_variance = (h * op.channels(d)).chunk(2, dim=1 - len(self.site.shape))
        std = (0.5 * log_variance).exp()
        return mean + self.noise(std) * std

    def noise(self, like: Tensor) -> Tensor:
        """Return standard normal values in the shape, dtype and device of `like`.

        Without `generator_seed`, or in compiled code, torch's generator draws them. Else a CPU generator of this layer
        with that seed draws them. The state before each draw is kept, for the last 16 runs. When gradient checkpointing
        runs the layer again in a backward pass, the kept state (the latest one, if that run has none) gives the same
        noise. The generator then continues from its present state.
        """
        if self.cfg.generator_seed is None or not eager():
            return torch.randn_like(like)
        if self.generator is None:
            self.generator = torch.Generator("cpu").manual_seed(self.cfg.generator_seed)
        # in training, a number for this run from torch's generator, which checkpointing restores
        generator, ticket = self.generator, new_seed() if self.layer.training else 0
        now = generator.get_state()
        again = torch._C._current_graph_task_id() != -1 and self.before  # the layer runs again, checkpointed
        if again:
            generator.set_state(self.before.get(ticket, next(reversed(self.before.values()))))
        else:
            self.before.pop(ticket, None)
            self.before[ticket] = now
            if len(self.before) > KEPT:
                del self.before[next(iter(self.before))]
        pinned = like.is_cuda  # from such memory CUDA copies without a wait
        noise = torch.randn(like.shape, generator=generator, dtype=like.dtype, device="cpu", pin_memory=pinned)
        if again:
            generator.set_state(now)
        return noise.to(like.device, non_blocking=pinned)
