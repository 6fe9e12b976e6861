# SPDX-License-Identifier: Apache-2.0
"""The configs within a LoraConfig: settings of one variant each."""

from __future__ import annotations

from dataclasses import dataclass

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
