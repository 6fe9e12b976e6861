# SPDX-License-Identifier: Apache-2.0
"""The configs within a LoraConfig: settings of one variant each."""

from __future__ import annotations

from dataclasses import dataclass, field

from graft.config.base import validate
from graft.core.errors import ConfigError


@dataclass
class KasaConfig:
    """Weights of KaSA's regularisation, `LoraModel._get_kasa_loss()`, which the training loop adds to its loss.

    Raises:
        ConfigError: a weight is negative.
    """

    beta: float = 1e-4  # of ‖d‖²
    gamma: float = 1e-3  # of ‖Bᵀ B - 1‖ + ‖A Aᵀ - 1‖

    def __post_init__(self) -> None:
        validate(self)
        for name in ("beta", "gamma"):
            if getattr(self, name) < 0:
                raise ConfigError(f"`{name}` must be non-negative, got {getattr(self, name)}.")


@dataclass
class ArrowConfig:
    """Arrow (arXiv 2405.11157): the most fitting experts for each token; GenKnowSub (2025.acl-short.54).

    Raises:
        ConfigError: a number is not positive.
    """

    top_k: int = 3  # experts for each token
    router_temperature: float = 1.0  # of the softmax over them
    use_gks: bool = False  # experts act without general knowledge
    task_adapter_names: list[str] | None = field(default=None, init=False)  # `create_arrow_model` notes both
    gks_adapter_names: list[str] | None = field(default=None, init=False)
    rng_seed: int | None = None  # of the power iteration's start

    def __post_init__(self) -> None:
        if self.top_k <= 0:
            raise ConfigError("top_k cannot be negative.")
        if self.router_temperature <= 0:
            raise ConfigError("router_temperature must be greater than 0.")
