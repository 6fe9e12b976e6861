# SPDX-License-Identifier: Apache-2.0
"""PolyConfig: the fields of PEFT 0.21.2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from graft.config.fields import Targeted, require_positive_rank
from graft.core.errors import ConfigError


@dataclass(kw_only=True)
class PolyConfig(Targeted):
    """Poly (arXiv 2202.13914) and, with `n_splits` > 1, multi-head routing (2211.03831).

    Raises:
        ConfigError: a number that is not positive, or another `poly_type`.
    """

    peft_type: Any = "POLY"
    r: int = 8  # rank of each skill
    init_weights: bool = True  # B starts at 0
    poly_type: Literal["poly"] = "poly"
    n_tasks: int = 1
    n_skills: int = 4  # of each layer
    n_splits: int = 1  # of its inputs and outputs

    def __post_init__(self) -> None:
        if self.poly_type not in ("poly", None):
            raise ConfigError(
                f"Unsupported poly_type: {self.poly_type}. Currently, only the following types are supported: `poly`."
            )
        super().__post_init__()
        require_positive_rank(self.r)
        for name in ("n_tasks", "n_skills", "n_splits"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`{name}` must be a positive integer, got {getattr(self, name)}.")
