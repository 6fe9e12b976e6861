# SPDX-License-Identifier: Apache-2.0
"""VeRA: Vector-based Random Matrix Adaptation, arXiv 2310.11454."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from graft.config.fields import LayerRange, Targets, require_positive_rank
from graft.config.targets import PHI_ATTENTION
from graft.core.dropout import share_dropped
from graft.core.errors import ConfigError, warn
from graft.core.method import Method
from graft.core.params import Transient
from graft.core.site import Site
from graft.kernels.low_rank import autocast, dropout
from graft.kernels.scaled_low_rank import add_scaled, linear_with, one_product_pays
from graft.kernels.worth import worth_it


@dataclass(kw_only=True)
class VeraConfig(Targets, LayerRange):
    """VeRA: ΔW = diag(λ_b) B diag(λ_d) A, with random A and B that all layers share and that never train."""

    peft_type: Any = "VERA"
    r: int = 256
    projection_prng_key: int = 0  # seed of A and B
    save_projection: bool = True  # store A and B too, so that a checkpoint does not depend on the generator
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    fan_in_fan_out: bool = False  # the layers store (in, out); corrected by layer type
    bias: str = "none"  # which base biases train: none, all, vera_only
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_rank(self.r)
        if not self.save_projection:
            warn(
                "Specified to not save vera_A and vera_B: they are drawn again from `projection_prng_key` on load, "
                "which gives the same values only if torch's generator is the same."
            )


class VeRA(Method):
    """ΔW = diag(λ_b) B diag(λ_d) A. A (r, in) and B (out, r) are cut from matrices that all layers share."""

    config = VeraConfig
    prefix = "vera_lambda_"
    targets = PHI_ATTENTION
    shares = True

    vera_lambda_b: nn.Parameter  # (out,)
    vera_lambda_d: nn.Parameter  # (r,)
    vera_A: Tensor  # (r, widest in), shared
    vera_B: Tensor  # (widest out, r), shared
    vera_dropout: nn.Module

    @classmethod
    def share(cls, sites: Sequence[Site], cfg: VeraConfig, existing, others):
        wide_out, wide_in = max(s.out_features for s in sites), max(s.fan_in for s in sites)
        for name, other in others.items():
            for field in ("projection_prng_key", "save_projection", "r"):
                if getattr(other, field) != getattr(cfg, field):
                    raise ConfigError(
                        "VeRA projections are shared: they must be saved for all adapters or none, and drawn alike. "
                        f"{field} is {getattr(cfg, field)}, but adapter '{name}' has {getattr(other, field)}."
                    )
        if existing and others:
            A, B = (existing[f"vera_{x}"][next(iter(others))] for x in "AB")
            for name, size, needed in (("vera_A", A.shape[1], wide_in), ("vera_B", B.shape[0], wide_out)):
                if size < needed:
                    raise ConfigError(
                        f"{name} has a size of {size} but {needed} or greater is required; add the adapter with the "
                        "widest layers first."
                    )
        else:
            generator = torch.Generator("cpu").manual_seed(cfg.projection_prng_key)
            A, B = torch.empty(cfg.r, wide_in), torch.empty(wide_out, cfg.r)
            for matrix in (A, B):  # kaiming uniform: the bound follows from the number of inputs
                bound = math.sqrt(6 / matrix.shape[1])
                if not matrix.is_meta:
                    matrix.uniform_(-bound, bound, generator=generator)
        keep = (lambda t: t) if cfg.save_projection else Transient
        return dict(vera_A=keep(A), vera_B=keep(B))

    @classmethod
    def build(cls, site: Site, cfg: VeraConfig, shared):
        return shared | dict(
            r=cfg.r,
            vera_lambda_b=nn.Parameter(torch.ones(site.out_features)),
            vera_lambda_d=nn.Parameter(torch.randn(cfg.r)),
            vera_dropout=nn.Dropout(cfg.vera_dropout) if cfg.vera_dropout > 0 else nn.Identity(),
        )

    def init(self, cfg: VeraConfig) -> None:
        if cfg.init_weights:
            nn.init.constant_(self.vera_lambda_d, cfg.d_initial)
            nn.init.zeros_(self.vera_lambda_b)

    @property
    def projections(self) -> tuple[Tensor, Tensor]:
        return self.vera_A[:, : self.layer.fan_in], self.vera_B[: self.layer.out_features]

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B = self.projections
        return self.vera_lambda_d[:, None] * A, self.vera_lambda_b[:, None] * B

    def join(self, x: Tensor) -> Tensor:
        layer, base = self.layer, self.layer.base_layer
        A, B = self.projections
        W = layer.base_weight
        if (
            share_dropped(self.vera_dropout) == 0
            and worth_it(x)
            and W.dtype == x.dtype == A.dtype  # a sum would round ΔW to the dtype of W
            and one_product_pays(x.numel() // x.shape[-1], *W.shape)
        ):
            call = partial(layer.op.call, base)
            return linear_with(
                W, base.bias, x, A, B, self.vera_lambda_d, self.vera_lambda_b, call, layer.op.input_gradient
            )
        return super().join(x)

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        layer, p = self.layer, share_dropped(self.vera_dropout)
        if p is None or not layer.may_fuse:
            return super().post(x, y)
        A, B, d, b = autocast(x, *self.projections, self.vera_lambda_d, self.vera_lambda_b)
        x = x.to(A.dtype)
        return add_scaled(y, (dropout(x, p) if p else x) @ A.T, B, d, b)

    def branch(self, x: Tensor) -> Tensor:
        op, base = self.layer.op, self.layer.base_layer
        if not op.takes_ids:
            x = self.vera_dropout(x)
        if not op.factorable(base):
            return super().branch(x)
        A, B = self.projections  # scale activations, which is cheaper than scaling A and B
        z = op.down(base, x, A) * op.channels(self.vera_lambda_d)
        return op.up(base, z, B) * op.channels(self.vera_lambda_b)
