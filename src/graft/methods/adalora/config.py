# SPDX-License-Identifier: Apache-2.0
"""AdaLoraConfig: LoRA's fields, the budget and its schedule."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from graft.core.errors import ConfigError, warn
from graft.methods.lora.config import LoraConfig


@dataclass(kw_only=True)
class AdaLoraConfig(LoraConfig):
    """AdaLoRA: LoRA in the form of a singular value decomposition; training prunes its least important values.

    Call `model.base_model.update_and_allocate(step)` after each optimizer step, before gradients are zeroed; or use
    `graft.train.adalora_callback` (transformers' Trainer) or `graft.train.allocate_on_step` (any optimizer).
    """

    peft_type: Any = "ADALORA"
    target_r: int = 8  # average rank at the end
    init_r: int = 12  # rank of every layer at the start
    tinit: int = 0  # steps before pruning begins
    tfinal: int = 0  # steps at the end, in which ranks stay as they are
    deltaT: int = 1  # steps between two allocations
    beta1: float = 0.85  # smoothing of the sensitivity
    beta2: float = 0.85  # smoothing of its uncertainty
    orth_reg_weight: float = 0.5  # weight of the loss that keeps A and B orthogonal
    total_step: int | None = None  # number of training steps; required
    rank_pattern: dict[str, list[bool]] | None = None  # type: ignore[assignment]  # result: what each layer kept

    patterns: ClassVar[dict[str, str]] = {}
    results: ClassVar[tuple[str, ...]] = ("rank_pattern",)
    counters: ClassVar[tuple[str, ...]] = ("total_step", "tinit", "tfinal", "deltaT")

    def __post_init__(self) -> None:
        if self.use_dora:
            raise ConfigError("PeftType.ADALORA does not support DoRA.")
        if self.init_lora_weights == "loftq" or self.loftq_config:
            raise ConfigError("PeftType.ADALORA does not support LOFTQ.")
        super().__post_init__()
        if self.total_step is None or self.total_step <= 0:
            raise ConfigError("AdaLoRA does not work when `total_step` is None, supply a value > 0.")
        for name, least in {"init_r": 1, "target_r": 1, "tinit": 0, "tfinal": 0, "deltaT": 1}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        if self.tinit >= self.total_step - self.tfinal:
            raise ConfigError(
                "The supplied schedule values don't allow for a budgeting phase. Decrease `tfinal`/`tinit` or increase "
                f"`total_step`: tinit={self.tinit}, tfinal={self.tfinal}, total_step={self.total_step}."
            )
        if self.orth_reg_weight < 0:
            text = "`orth_reg_weight` should be greater than or equal to 0, but the value passed is"
            raise ConfigError(f"{text} {self.orth_reg_weight}")
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"`{name}` must be between 0 and 1, got {getattr(self, name)}.")
        if self.target_r > self.init_r:
            warn(
                f"target_r={self.target_r} is more than init_r={self.init_r}, the rank at the start: nothing will be "
                "pruned."
            )
        if self.r != 8:
            warn("Note that `r` is not used in AdaLora and will be ignored. Use `init_r`.")

    def _check_patterns(self) -> None:
        """Check nothing: the rank pattern holds masks here."""

    def saved_dict(self) -> dict[str, Any]:
        values = super().saved_dict()
        if self.rank_pattern:  # keys without the adapter's name
            values["rank_pattern"] = {re.sub(r"(\.lora_E)\..*$", r"\1", k): v for k, v in self.rank_pattern.items()}
        return values

    def kept(self, key: str) -> list[bool] | None:
        """Return the mask of the singular values that the layer at `key` kept; None while there is none."""
        for name, mask in (self.rank_pattern or {}).items():
            if name == f"{key}.lora_E" or name.startswith(f"{key}.lora_E."):
                return mask
        return None
