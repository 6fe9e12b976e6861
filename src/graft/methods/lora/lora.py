# SPDX-License-Identifier: Apache-2.0
"""LoRA, arXiv 2106.09685: ΔW = s · B A, A (r, in), B (out, r); s = alpha / r, or alpha / √r with `use_rslora`."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from graft.config.fields import LORA
from graft.core.effect import Effect, Factors, Update
from graft.core.errors import ConfigError
from graft.core.method import Method, PublishedRate, Tensors, Tuner
from graft.kernels.decomposed import row_norms
from graft.methods.lora import checks, shift
from graft.methods.lora.config import LoraConfig
from graft.methods.lora.replicate import replicate
from graft.methods.lora.started import Started
from graft.methods.lora.sub_configs import VARIANTS

MAMBA = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
UNTARGETABLE = {"conv1d"}  # of them


def kasa_loss(tuner: Tuner, adapter_names: str | list[str] | None = None) -> Tensor | float:
    """Return the sum of `KaSA.loss` over all layers and KaSA adapters; 0.0 without any.

    Other adapters are left out. Terms are added on their own devices.

    Args:
        adapter_names: one name or several; the active ones if None.

    Raises:
        AdapterNotFoundError: the model has no adapter of that name.
    """
    return sum((m.loss() for m in adapters_of(tuner, adapter_names, "kasa_config")), 0.0)


def monteclora_loss(tuner: Tuner, adapter_names: str | list[str] | None = None) -> Tensor | float:
    """Return the sum of `MonteCLoRA.loss` over layers and MonteCLoRA adapters, divided by their number; 0.0 without
    any. Other adapters are left out. Terms are added on their own devices.

    Args:
        adapter_names: one name or several; the active ones if None.

    Raises:
        AdapterNotFoundError: the model has no adapter of that name.
    """
    methods = adapters_of(tuner, adapter_names, "monteclora_config")
    return sum((m.loss() for m in methods), 0.0) / max(1, len(methods))


def adapters_of(tuner: Tuner, adapter_names: str | list[str] | None, variant: str) -> list[Method]:
    """Return the methods, over all layers, of the adapters with a config that selects `variant` (a key of VARIANTS).

    `adapter_names`: one name or several; None: the active adapters. Raises AdapterNotFoundError for a name that the
    model does not have.
    """
    names = tuner.active_adapters if adapter_names is None else adapter_names
    names = [names] if isinstance(names, str) else names
    tuner.check_known(names)
    names = [name for name in names if variant in tuner.peft_config[name].variants]
    return [layer.methods[name] for layer in tuner.layers.values() for name in names if name in layer.methods]


def import_beside(where: str) -> Any:
    """Import the module "module" of this folder from "module:name", and return its attribute "name"."""
    module, name = where.split(":")
    return getattr(import_module(f"graft.methods.lora.{module}"), name)


class LoRA(Started):
    """LoRA, arXiv 2106.09685: ΔW = s · B A, with A (r, in), B (out, r) and s = alpha / r, or alpha / √r."""

    prefix = "lora_"
    lays_out_stacks = True  # as files of PEFT do
    published_lr = PublishedRate(6e-5, 5e-4, "arXiv 2106.09685, tables 9 to 12")
    targets = LORA
    facts = ("r", "lora_alpha", "use_rslora", "use_dora", "lora_bias")
    row_norms, subtract_start = staticmethod(row_norms), staticmethod(shift.subtract_start)  # for merges of files
    files = {"lora_magnitude_vector": "{0}"}
    tuner_methods = {"_get_kasa_loss": kasa_loss, "_get_monteclora_loss": monteclora_loss}
    holds_any = True  # its tensors can hold any product; of others combinations are plain LoRA

    lora_A: nn.Module  # weight (r, in), for convolutions (r, in, *kernel)
    lora_B: nn.Module  # weight (out, r), for convolutions (out, r / groups, 1, …)
    lora_embedding_A: nn.Parameter  # (r, vocabulary)
    lora_embedding_B: nn.Parameter  # (embedding_dim, r)
    lora_magnitude_vector: nn.Module  # DoRA's
    lora_dropout: nn.Module
    scaling: float
    lora_bias: bool

    @classmethod
    def variant(cls, cfg: LoraConfig) -> type[LoRA]:
        """Return the subclass for the first name in `cfg.variants`, such as DoRA for `use_dora`; imports its file.

        Return `cls` if the config selects no variant.
        """
        return next((import_beside(VARIANTS[name]) for name in cfg.variants), cls)

    @classmethod
    def restructure(cls, cfg: LoraConfig, model: nn.Module) -> Callable[[], None] | None:
        """Replicate the model's layers as `cfg.layer_replication` says, and return the function that undoes it; None
        without that option.
        """
        return replicate(model, cfg.layer_replication) if cfg.layer_replication else None

    @classmethod
    def prepare(cls, cfg: LoraConfig, model: nn.Module) -> None:
        """Raise ConfigError if the model is of a Mamba family (MAMBA) and the set `target_modules` names "conv1d".

        Else do nothing. The entry has to equal "conv1d": a longer path or a regex does not count.
        """
        kind, targets = getattr(getattr(model, "config", None), "model_type", None), cfg.target_modules
        hit: set[str] = UNTARGETABLE & targets if kind in MAMBA and isinstance(targets, set) else set()
        if hit:
            raise ConfigError(
                f"Module {sorted(hit)} is incompatible with Mamba-based models ({kind}): an update mixes its groups, "
                "and no call shows them. Take it out of target_modules."
            )

    def check(self) -> str | None:
        """Return the reasons of `Method.check`.

        Before that `check_site` raises ConfigError for a rank, bias or option that the layer cannot have.
        """
        checks.check_site(self.site, self.cfg)
        return super().check()

    def build(self, shared: dict[str, object], device: torch.device | None = None) -> dict[str, Any]:
        """Return `scaling` and two factors that train.

        Embeddings get normal values: `lora_embedding_A` (r, vocabulary) and `lora_embedding_B` (dim, r). Other layers
        get the modules `lora_A` (r, in) and `lora_B` (out, r) of their op, with a bias in B for `lora_bias`. Those of
        linear layers have values only for the initialisations False and "eva"; `init_values` fills the others. Warns if
        the adapter cannot merge (`lora_bias` on a layer without bias, groups > 1). `lora_shift` is added if
        `keeps_shift`. A and B are made on `device` (None: the default one), in the default dtype.
        """
        site, cfg, r = self.site, self.cfg, self.cfg.r
        values: dict[str, object] = dict(scaling=cfg.lora_alpha / (math.sqrt(r) if cfg.use_rslora else r))
        if site.op.takes_ids:
            return values | dict(
                lora_embedding_A=nn.Parameter(torch.randn(r, site.in_features, device=device)),
                lora_embedding_B=nn.Parameter(torch.randn(site.out_features, r, device=device)),
            )
        if cfg.lora_bias or site.op.count_groups(site.module) > 1:
            checks.warn_unmergeable(site, cfg)
        fill = cfg.init_lora_weights in (False, "eva")  # any other initialisation overwrites these values
        A, B = site.op.factor_modules(site.module, r, cfg.lora_bias, fill, device)  # type: ignore[misc]
        values |= dict(lora_A=A, lora_B=B)
        if self.keeps_shift:
            values[shift.NAME] = shift.Shift(self.shift_rank, site.shape, device)
        return values

    def tie_to_embedding(self, source: Method) -> None:
        """Put this adapter onto the memory of `source`, the same adapter on the tied embedding.

        Between an embedding and a head the factors are transposed and exchanged: (B A)ᵀ = Aᵀ Bᵀ. Between two layers of
        one kind A and B are shared as they are.
        """
        A, B = source.pair
        pair, like = self.pair, self.site.op.takes_ids == source.site.op.takes_ids
        pair[0].data, pair[1].data = (A.data, B.data) if like else (B.data.T, A.data.T)

    @property
    def pair(self) -> tuple[nn.Parameter, nn.Parameter]:
        """The parameters A (r, …) and B (out, …), as the layer stores them: `lora_embedding_A`, `_B` on an embedding,
        else the weights of `lora_A`, `lora_B`.
        """
        if self.site.op.takes_ids:
            return self.lora_embedding_A, self.lora_embedding_B
        return self.lora_A.weight, self.lora_B.weight

    def holding(self, A: Tensor, B: Tensor) -> Tensors:
        """Return tensors, by place, that make ΔW = s · B A: (`lora_A`, "weight") and (`lora_B`, "weight"); on an
        embedding `lora_embedding_A`, `_B`.

        A (…, r, fan_in) and B (…, out, r) are stored as they come; s is the adapter's scaling.
        """
        if self.site.op.takes_ids:
            return {("lora_embedding_A", ""): A, ("lora_embedding_B", ""): B}
        return {("lora_A", "weight"): A, ("lora_B", "weight"): B}

    def describe(self) -> Effect:
        """Return an `Update` by `factors`.

        It cannot merge (`why_unmergeable`) on a convolution with groups > 1, or with `lora_bias` on a layer without
        bias.
        """
        return Update(factors=self.factors, why_unmergeable=checks.unmergeable(self.site, self.cfg))

    def factors(self) -> Factors:
        """Return `Factors` of the modules `lora_A`, `lora_B`, the scaling and `lora_dropout`.

        On an embedding: the two parameters and the scaling, without dropout.
        """
        if self.site.op.takes_ids:
            return Factors(self.lora_embedding_A, self.lora_embedding_B, self.scaling)
        own, name = self.layer.__dict__, self.name  # not by attributes, which take twice the time
        modules, scaling = own["_modules"], own["scaling"][name]
        return Factors(modules["lora_A"][name], modules["lora_B"][name], scaling, modules["lora_dropout"][name])
