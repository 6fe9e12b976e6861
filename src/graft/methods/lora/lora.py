# SPDX-License-Identifier: Apache-2.0
"""LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685."""

from __future__ import annotations

import math
import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graft.config.fields import require_positive_rank
from graft.config.targets import LORA
from graft.core.errors import ConfigError, PeftWarning
from graft.core.method import Method
from graft.core.site import Site
from graft.methods.lora import init
from graft.methods.lora.config import LoraConfig
from graft.methods.lora.replicate import replicate

MAMBA = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
MAMBA_UNTARGETABLE = {"out_proj", "conv1d"}


class LoRA(Method):
    config = LoraConfig
    prefix = "lora_"
    targets = LORA
    empty: ClassVar[dict[str, Any]] = {
        **{f"lora_{x}": nn.ModuleDict() for x in ("A", "B", "magnitude_vector")},
        **{f"lora_embedding_{x}": nn.ParameterDict() for x in "AB"},
    }

    lora_A: nn.Module  # weight (r, in), for convolutions (r, in, *kernel)
    lora_B: nn.Module  # weight (out, r), for convolutions (out, r / groups, 1, …)
    lora_embedding_A: nn.Parameter  # (r, vocabulary)
    lora_embedding_B: nn.Parameter  # (embedding_dim, r)
    lora_dropout: nn.Module
    scaling: float
    lora_bias: bool

    @classmethod
    def restructure(cls, cfg: LoraConfig, model: nn.Module):
        return replicate(model, cfg.layer_replication) if cfg.layer_replication else None

    @classmethod
    def prepare(cls, cfg: LoraConfig, model: nn.Module) -> None:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        targets = cfg.target_modules
        hit: set[str] = MAMBA_UNTARGETABLE & targets if kind in MAMBA and isinstance(targets, set) else set()
        if hit:
            raise ConfigError(
                f"Module {sorted(hit)} is incompatible with Mamba-based models ({kind}): its kernels read the weight "
                "itself. Take it out of target_modules."
            )

    @classmethod
    def build(cls, site: Site, cfg: LoraConfig, shared):
        r = cfg.r
        require_positive_rank(r)
        values = dict(
            r=r,
            lora_alpha=cfg.lora_alpha,
            scaling=cfg.lora_alpha / (math.sqrt(r) if cfg.use_rslora else r),
            use_rslora=cfg.use_rslora,
            use_dora=cfg.use_dora,
            lora_bias=cfg.lora_bias,
            lora_dropout=nn.Dropout(cfg.lora_dropout) if cfg.lora_dropout > 0 else nn.Identity(),
        )
        if site.op.takes_ids:
            if cfg.lora_bias:
                raise ConfigError(f"lora_bias=True is not supported for Embedding (layer '{site.key}').")
            return values | dict(
                lora_embedding_A=nn.Parameter(torch.randn(r, site.in_features)),
                lora_embedding_B=nn.Parameter(torch.randn(site.out_features, r)),
            )
        if cfg.lora_bias and getattr(site.module, "bias", None) is None:
            text = f"`lora_bias=True` was passed but the targeted layer of type {site.type_name} has no bias."
            warnings.warn(f"{text} Adapter weights of '{site.key}' cannot be merged.", PeftWarning, stacklevel=2)
        groups = getattr(site.module, "groups", 1)
        if groups > 1:
            _check_groups(site, r, groups)
        A, B = site.op.factor_modules(site.module, r, cfg.lora_bias)  # type: ignore[misc]
        return values | dict(lora_A=A, lora_B=B)

    def init(self, cfg: LoraConfig) -> None:
        init.initialise(self, cfg.init_lora_weights)

    @classmethod
    def inits_from_weight(cls, cfg: LoraConfig) -> bool:
        return init.changes_base(cfg.init_lora_weights)

    def tie(self, source: Method) -> None:
        """Of a head tied to an embedding: (B A)ᵀ = Aᵀ Bᵀ, on the embedding's own memory."""
        A, B = source.pair
        self.lora_A.weight.data, self.lora_B.weight.data = B.data.T, A.data.T

    @property
    def pair(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A (r, …) and B (out, …) as they are stored."""
        if self.layer.op.takes_ids:
            return self.lora_embedding_A, self.lora_embedding_B
        return self.lora_A.weight, self.lora_B.weight  # type: ignore[return-value]

    def factors(self) -> tuple[Tensor, Tensor]:
        if getattr(self.layer.base_layer, "groups", 1) > 1:
            raise NotImplementedError(
                f"Merging is not supported for _ConvNd layers with groups > 1! Layer '{self.layer.site.key}', adapter "
                f"'{self.name}': A mixes the groups. Keep it unmerged, or leave grouped convolutions out."
            )
        A, B = self.pair
        return A.flatten(1), B.flatten(1) * self.scaling

    def delta_bias(self) -> Tensor | None:
        if not self.lora_bias:
            return None
        if self.layer.bias is None:
            raise RuntimeError(
                "Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias. "
                f"Layer '{self.layer.site.key}', adapter '{self.name}'."
            )
        return self.lora_B.bias * self.scaling  # type: ignore[return-value,operator]

    def branch(self, x: Tensor) -> Tensor:
        if self.layer.op.takes_ids:
            return super().branch(x)
        return self.lora_B(self.lora_A(self.lora_dropout(x))) * self.scaling


def _check_groups(site: Site, r: int, groups: int) -> None:
    if r % groups:
        raise ConfigError(
            f"Targeting a {site.type_name} with groups={groups} and rank {r} (layer '{site.key}'). Currently, support "
            "is limited to conv layers where the rank is divisible by groups. Either choose a different rank or do "
            "not target this specific layer."
        )
    warnings.warn("LoRA adapter added to ConvNd layer with groups > 1. Merging is not supported.", stacklevel=3)
