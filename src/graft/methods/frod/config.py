# SPDX-License-Identifier: Apache-2.0
"""The config of FRoD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from graft.config.fields import LayerRange, Targets
from graft.core.errors import ConfigError
from graft.methods.projections import warn_unsaved


@dataclass(kw_only=True)
class FrodConfig(Targets, LayerRange):
    """FRoD: W = U diag(λ) Vᵀ with one V for all layers of a category. λ trains, and few entries beside the diagonal."""

    peft_type: Any = "FROD"
    projection_prng_key: int = 0  # seed of the places of those entries
    save_projection: bool = True  # put V and the places into files, too: else a load computes and draws them again
    frod_dropout: float = 0.0
    fan_in_fan_out: bool = False  # the layers store (in, out); corrected by layer type
    bias: str = "none"  # which base biases train: none, all, frod_only
    init_weights: bool = True  # False: random, away from W
    sparse_rate: float = 0.01  # share of the entries beside the diagonal that train
    regularization_alpha: float = 0.001  # of the inverse in the search for V
    progressbar: bool = True  # accepted for PEFT's files: there is none
    runtime_offload_base_weight: bool = False  # accepted for PEFT's files: the base weight stays where it is

    counters: ClassVar[tuple[str, ...]] = ("projection_prng_key",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparse_rate <= 1:
            raise ConfigError(f"`sparse_rate` should be between 0 and 1, got {self.sparse_rate}")
        if not self.save_projection:
            warn_unsaved("frod_V and frod_s_indices")
