# SPDX-License-Identifier: Apache-2.0
"""LoRA, arXiv 2106.09685: ΔW = s · B A, A (r, in), B (out, r); s = alpha / r, or alpha / √r with `use_rslora`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from graft.config.fields import require_positive_rank
from graft.config.targets import LORA
from graft.core.errors import ConfigError
from graft.core.lean import Identity, bare
from graft.core.method import Method
from graft.core.ops import META
from graft.core.site import Site
from graft.kernels.low_rank import add_low_rank, low_rank_linear
from graft.methods.lora import checks, init
from graft.methods.lora.config import LoraConfig
from graft.methods.lora.plain import add_plain_rows, plain_factors
from graft.methods.lora.replicate import replicate

if TYPE_CHECKING:
    from graft.core.call import Rows
    from graft.core.layer import AdapterLayer


class LoRA(Method):
    config = LoraConfig
    prefix = "lora_"
    targets = LORA
    empty: ClassVar[dict[str, Any]] = {
        **{f"lora_{x}": nn.ModuleDict() for x in ("A", "B", "magnitude_vector")},
        **{f"lora_embedding_{x}": nn.ParameterDict() for x in "AB"},
    }
    unnamed = frozenset({"lora_magnitude_vector"})

    lora_A: nn.Module  # weight (r, in), for convolutions (r, in, *kernel)
    lora_B: nn.Module  # weight (out, r), for convolutions (out, r / groups, 1, …)
    lora_embedding_A: nn.Parameter  # (r, vocabulary)
    lora_embedding_B: nn.Parameter  # (embedding_dim, r)
    lora_dropout: nn.Module
    scaling: float
    lora_bias: bool

    @classmethod
    def variant(cls, cfg: LoraConfig) -> type[Method]:
        from graft.methods.lora.dora import DoRA

        return DoRA if cfg.use_dora else cls

    @classmethod
    def restructure(cls, cfg: LoraConfig, model: nn.Module):
        return replicate(model, cfg.layer_replication) if cfg.layer_replication else None

    @classmethod
    def prepare(cls, cfg: LoraConfig, model: nn.Module) -> None:
        checks.refuse_mamba(cfg, model)

    @classmethod
    def build(cls, site: Site, cfg: LoraConfig, shared, device=None):
        r = cfg.r
        require_positive_rank(r)
        values = dict(
            r=r,
            lora_alpha=cfg.lora_alpha,
            scaling=cfg.lora_alpha / (math.sqrt(r) if cfg.use_rslora else r),
            use_rslora=cfg.use_rslora,
            use_dora=cfg.use_dora,
            lora_bias=cfg.lora_bias,
            lora_dropout=nn.Dropout(cfg.lora_dropout) if cfg.lora_dropout > 0 else bare(Identity),
        )
        if site.op.takes_ids:
            if cfg.lora_bias:
                raise ConfigError(f"lora_bias=True is not supported for Embedding (layer '{site.key}').")
            return values | dict(
                lora_embedding_A=nn.Parameter(torch.randn(r, site.in_features, device=device)),
                lora_embedding_B=nn.Parameter(torch.randn(site.out_features, r, device=device)),
            )
        checks.check_site(site, cfg)
        fill = cfg.init_lora_weights is False  # anything else overwrites what is drawn here
        A, B = site.op.factor_modules(site.module, r, cfg.lora_bias, fill, device)  # type: ignore[misc]
        return values | dict(lora_A=A, lora_B=B)

    @classmethod
    def placeholders(cls, site: Site, cfg: LoraConfig, shared):
        return cls.build(site, cfg, shared, META)

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
        checks.refuse_groups(self.layer.site, self.name)
        A, B = self.pair
        return A.flatten(1), B.flatten(1) * self.scaling

    def check_merge(self) -> None:
        checks.refuse_groups(self.layer.site, self.name)
        self.delta_bias()

    def delta_bias(self) -> Tensor | None:
        if not self.lora_bias:
            return None
        if self.layer.bias is None:
            raise RuntimeError(
                "Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias. "
                f"Layer '{self.layer.site.key}', adapter '{self.name}'."
            )
        return self.lora_B.bias * self.scaling  # type: ignore[return-value,operator]

    def join(self, x: Tensor) -> Tensor:
        layer = self.layer
        found = plain_factors(layer, self.name)
        if found is None:
            return super().join(x)
        if torch.is_grad_enabled():
            return low_rank_linear(layer.base_layer, layer.op.input_gradient, layer.base_weight, x, *found)
        return add_low_rank(layer.base_layer(x), x, *found)

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        found = plain_factors(self.layer, self.name) if self.layer.may_fuse else None
        return super().post(x, y) if found is None else add_low_rank(y, x, *found)

    @classmethod
    def add_rows(cls, layer: AdapterLayer, rows: Rows, x: Tensor, y: Tensor) -> Tensor:
        added = add_plain_rows(layer, rows, x, y) if layer.may_fuse else None
        return super().add_rows(layer, rows, x, y) if added is None else added

    def branch(self, x: Tensor) -> Tensor:
        if self.layer.op.takes_ids:
            return super().branch(x)
        return self.lora_B(self.lora_A(self.lora_dropout(x))) * self.scaling
