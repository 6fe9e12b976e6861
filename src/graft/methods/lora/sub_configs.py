# SPDX-License-Identifier: Apache-2.0
"""The configs within a LoraConfig: settings of one variant each."""

from __future__ import annotations

from dataclasses import dataclass, field
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
