# SPDX-License-Identifier: Apache-2.0
"""Super-Tuning: the largest entries of each weight train, optionally with a low-rank update. arXiv 2607.09287."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from graft.config.fields import BELOW_1, COUNT, LORA, Targets
from graft.core.effect import Effect, Factors, Update
from graft.core.errors import ConfigError, warn
from graft.core.method import Method, Tensors, WeightUse, fill_kaiming, make_dropout
from graft.core.ops import make_linear
from graft.kernels.sparse import Scattered
from graft.methods.projections import check_places, maybe_transient

MOST = 2**31  # entries of a weight that int32 counts
SAVING = "Super-Tuning indices must be saved for all adapters or none (save_precomputed_indices)"


@dataclass(kw_only=True)
class SupertuningConfig(Targets):
    """Super-Tuning: a share of 1 - sparsity of the entries of each weight train, those of largest magnitude."""

    peft_type: str = "SUPERTUNING"
    sparsity: Annotated[float, BELOW_1] = 0.99  # share of the entries that stay; in [0, 1)
    select_top: bool = True  # False: the entries of smallest magnitude
    r: Annotated[int | None, COUNT] = None  # rank of an additional LoRA update; None: there is none
    lora_alpha: float | None = None  # its update counts alpha / r times; None: twice
    lora_dropout: Annotated[float, BELOW_1] = 0.0  # acts on its input
    init_weights: bool = True  # zero updates; else random
    save_precomputed_indices: bool = True  # put the places into files, which then do not depend on the weight

    def __post_init__(self) -> None:
        """Validate the fields; set `lora_alpha` to 2 r if `r` is set and `lora_alpha` is None.

        Warns with `save_precomputed_indices=False` that a load may choose other entries.

        Raises:
            ConfigError: `lora_alpha` is set without `r`.
        """
        super().__post_init__()
        if self.r is None and self.lora_alpha is not None:
            raise ConfigError("`lora_alpha` is set, but `r` is None: there is no low-rank update to scale. Set r.")
        if self.r is not None and self.lora_alpha is None:
            self.lora_alpha = 2 * self.r
        if not self.save_precomputed_indices:
            warn(
                "Specified to not save the indices of the entries: a load finds them again by the magnitudes of the "
                "base weight, which must be the same. Among equal magnitudes the choice may differ."
            )


class SuperTuning(Method[SupertuningConfig]):
    """Super-Tuning, arXiv 2607.09287: ΔW = v at the places of the largest |W₀|, plus s · B A."""

    prefix = "supertuning_"
    targets = LORA
    facts = ()

    supertuning_values: nn.Parameter  # v (k,)
    supertuning_indices: Tensor  # (k,) int32: places in the weight as a flat list, the largest first
    supertuning_lora_A: nn.Linear  # weight (r, fan_in)
    supertuning_lora_B: nn.Linear  # weight (out, r)
    supertuning_lora_dropout: nn.Module
    scaling: float
    orders: list[Tensor] | None = None  # of `find_order`; set by `build`

    @property
    def size(self) -> int:
        """The number of entries that train: ⌊entries of the weight · (1 - sparsity)⌋."""
        return int(math.prod(self.site.shape) * (1 - self.cfg.sparsity))

    def check(self) -> str | None:
        """Return the reason of `Method.check`.

        Before that, on layers of known type, raises ConfigError if no entry would train, or the weight has more than
        2³¹ entries.
        """
        site = self.site
        if site.op.known and (self.size < 1 or math.prod(site.shape) > MOST):
            raise ConfigError(
                f"sparsity={self.cfg.sparsity} leaves {self.size} entries of layer '{site.key}', {site.shape}: "
                f"at least one is needed, of at most {MOST}. Choose another sparsity, or exclude the layer."
            )
        return super().check()

    def why_incompatible(self, other: object) -> str | None:
        """Return the reason against an adapter with another `save_precomputed_indices`; None for an equal one, or a
        config without that field.
        """
        saves = getattr(other, "save_precomputed_indices", self.cfg.save_precomputed_indices)
        return None if saves == self.cfg.save_precomputed_indices else SAVING

    def uses_weight(self) -> WeightUse:
        """Return `WeightUse.STARTS`; with `save_precomputed_indices=False` also `WeightUse.BEFORE_LOAD`, so that
        `init_values` finds the places before a load.
        """
        return WeightUse.STARTS if self.cfg.save_precomputed_indices else WeightUse.STARTS | WeightUse.BEFORE_LOAD

    def describe(self) -> Effect:
        """Return an `Update` by `delta`, with the factors of the LoRA update if r is set."""
        return Update(self.delta, factors=None if self.cfg.r is None else self.factors_beside)

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return `supertuning_values` (k,), zeros or normal with `init_weights=False`, and `supertuning_indices` (k,)
        int32 zeros, in files only with `save_precomputed_indices`.

        With r also the linear layers `supertuning_lora_A` (r, fan_in) and `supertuning_lora_B` (out, r) without bias,
        `supertuning_lora_dropout` (`make_dropout(cfg.lora_dropout)`), r, and scaling = alpha / r, 0 without alpha. The
        layers begin as nn.Linear does. `orders` of the method becomes []. Floating-point tensors are made on the
        default device, in the default dtype.
        """
        cfg, site, self.orders = self.cfg, self.site, []
        places = torch.zeros(self.size, dtype=torch.int32)
        values: dict[str, object] = dict(
            supertuning_values=nn.Parameter((torch.zeros if cfg.init_weights else torch.randn)(self.size)),
            supertuning_indices=maybe_transient(places, cfg.save_precomputed_indices),
        )
        if cfg.r is None:
            return values
        return values | dict(
            r=cfg.r,
            scaling=(cfg.lora_alpha or 0) / cfg.r,
            supertuning_lora_A=make_linear(site.fan_in, cfg.r, bias=False),
            supertuning_lora_B=make_linear(cfg.r, site.out_features, bias=False),
            supertuning_lora_dropout=make_dropout(cfg.lora_dropout),
        )

    @torch.no_grad()
    def init_values(self) -> None:
        """Fill the indices with the flat places of the k largest |W₀|; the smallest with `select_top=False`.

        They stay in the order of `topk`, by value.

        With r fill A kaiming uniform (a=√5), B with zeros (as A with `init_weights=False`).
        """
        cfg, W = self.cfg, self.layer.W0.detach()
        largest = W.abs().flatten().topk(self.size, largest=cfg.select_top)
        self.supertuning_indices.copy_(largest.indices)
        if cfg.r is not None:
            fill_kaiming(self.supertuning_lora_A.weight)
            self.fill_start(self.supertuning_lora_B.weight)

    def from_file_tensors(self, tensors: Tensors, cfg: SupertuningConfig) -> Tensors:
        """Return the file's tensors unchanged.

        Raises CheckpointError if they have indices below 0 or beyond the weight's entries. Shapes are not checked, and
        missing indices pass.
        """
        return check_places(tensors, "supertuning_indices", math.prod(self.site.shape), self.site.key)

    def delta(self) -> Scattered:
        """Return ΔW with v at the indices, 0 elsewhere, as a `Scattered`. Except under a compiler it gets the order of
        the indices that an earlier call found.
        """
        orders = None if torch.compiler.is_compiling() else self.orders
        return Scattered(self.supertuning_values, self.supertuning_indices.long(), self.site.shape, orders=orders)

    def factors_beside(self) -> Factors:
        """Return the LoRA update's factors with scaling and dropout: the modules on a linear layer, else their
        weights.
        """
        pair = self.supertuning_lora_A, self.supertuning_lora_B
        A, B = pair if self.site.op.linear else (m.weight for m in pair)
        return Factors(A, B, self.scaling, self.supertuning_lora_dropout)
