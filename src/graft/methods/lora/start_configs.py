# SPDX-License-Identifier: Apache-2.0
"""The configs within a LoraConfig that set how one initialisation works."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graft.config.base import validate
from graft.core.errors import ConfigError


def require(name: str, value: Any, known: tuple[Any, ...]) -> None:
    """Raise ConfigError unless `value` is one of those known."""
    if value not in known:
        raise ConfigError(f"`{name}` must be one of {', '.join(map(repr, known))}, got {value!r}.")


@dataclass
class LoftQConfig:
    """LoftQ (arXiv 2310.08659): the base weight is quantized, and A, B begin with what that loses.

    Raises:
        ConfigError: a value out of range.
    """

    loftq_bits: int = 4  # 4: NF4 in blocks of 64; 8: integers, a scale for each row
    loftq_iter: int = 1  # rounds of quantizing and decomposing

    def __post_init__(self) -> None:
        validate(self)
        require("loftq_bits", self.loftq_bits, (4, 8))
        if self.loftq_iter < 1:
            raise ConfigError(f"`loftq_iter` must be at least 1, got {self.loftq_iter}.")


@dataclass
class EvaConfig:
    """EVA (arXiv 2410.07170): A begins with principal components of a layer's inputs; ranks go where variance is.

    Raises:
        ConfigError: a value out of range.
    """

    rho: float = 2.0  # a layer's rank can grow to rho · r
    tau: float = 0.99  # cosine similarity of a component before and after a batch from which on it has converged
    use_label_mask: bool = True  # leave out tokens whose label is `label_mask_value`
    label_mask_value: int = -100
    whiten: bool = False  # divide components by the roots of their singular values
    adjust_scaling_factors: bool = True  # change alpha with the rank, so that the scaling stays

    def __post_init__(self) -> None:
        validate(self)
        if self.rho < 1.0:
            raise ConfigError(f"`rho` must be >= 1.0, got {self.rho}.")
        if not 0.0 <= self.tau <= 1.0:
            raise ConfigError(f"`tau` must be between 0.0 and 1.0, got {self.tau}.")


@dataclass
class CordaConfig:
    """CorDA (arXiv 2406.05223): A, B begin with singular triples of W C, where C is the covariance of the inputs.

    Raises:
        ConfigError: an unknown `corda_method`.
    """

    cache_file: str | None = None  # the triples, written once and read afterwards
    covariance_file: str | None = None  # the covariances, likewise; they serve any rank
    corda_method: str = "ipm"  # ipm: the largest triples, to learn a task; kpm: the smallest, to keep knowledge
    verbose: bool = False  # show a progress bar
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True  # accepted as in PEFT; graft leaves no such fields on modules

    def __post_init__(self) -> None:
        validate(self)
        require("corda_method", self.corda_method, ("ipm", "kpm"))


@dataclass
class LoraGAConfig:
    """LoRA-GA (arXiv 2407.05000): A, B begin with singular vectors of the weight's gradient.

    Raises:
        ConfigError: an unknown name, or `stable_gamma` is not positive.
    """

    direction: str = "ArB2r"  # which of the 2r vectors A and B take: ArBr, A2rBr, ArB2r or random
    scale: str = "stable"  # stable, weight_svd, gd_scale or unit
    stable_gamma: int = 16  # of "stable"

    def __post_init__(self) -> None:
        validate(self)
        require("direction", self.direction, ("ArBr", "A2rBr", "ArB2r", "random"))
        require("scale", self.scale, ("stable", "weight_svd", "gd_scale", "unit"))
        if self.stable_gamma <= 0:
            raise ConfigError(f"`stable_gamma` must be positive, got {self.stable_gamma}.")
