# SPDX-License-Identifier: Apache-2.0
"""The configs within a LoraConfig that set how one variant works."""

from __future__ import annotations

from dataclasses import dataclass, field

from graft.config.base import validate
from graft.core.errors import ConfigError

DIRECTIONS = ("batch_average", "batch_average_once", "random")


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
        validate(self)
        if self.top_k <= 0:
            raise ConfigError("top_k cannot be negative.")
        if self.router_temperature <= 0:
            raise ConfigError("router_temperature must be greater than 0.")


@dataclass
class BdLoraConfig:
    """Which factors BD-LoRA makes block-diagonal: the ones that a server splits over its devices.

    For row-sharded modules (output and down projections) that is A, for column-sharded ones (q, k, v, up, gate) B.

    Raises:
        ConfigError: a pattern stands in both lists, or `nblocks` is not positive.
    """

    target_modules_bd_a: list[str] | None = None  # parts of the paths of modules whose A is block-diagonal
    target_modules_bd_b: list[str] | None = None  # the same for B
    nblocks: int = 1  # how many blocks such a factor has
    match_strict: bool = True  # an adapted module that fits no pattern is an error; else it gets plain LoRA

    def __post_init__(self) -> None:
        validate(self)
        a, b = self.target_modules_bd_a, self.target_modules_bd_b
        if set(a or ()) & set(b or ()):
            raise ConfigError(f"Found overlapping modules in target_modules_bd lists: {a} (A) and {b} (B).")
        if self.nblocks <= 0:
            raise ConfigError(f"`nblocks` should be positive, got {self.nblocks}.")


@dataclass
class VeloraConfig:
    """What VeLoRA keeps of the inputs of A for the backward pass.

    Raises:
        ConfigError: a value out of range.
    """

    num_groups: int = 64  # numbers that are kept of each input vector: more are more exact and take more memory
    scale: float = 1.0  # of what is put together again from them
    init_type: str = "batch_average"  # the direction of the projection: of each batch, of the first, random

    def __post_init__(self) -> None:
        validate(self)
        for name in ("num_groups", "scale"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"`{name}` should be positive, got {getattr(self, name)}.")
        if self.init_type not in DIRECTIONS:
            raise ConfigError(f"Unsupported `init_type` {self.init_type!r}. Supported values are {DIRECTIONS}.")


@dataclass
class MontecloraConfig:
    """How MonteCLoRA draws A in training, and weights of its loss, `LoraModel._get_monteclora_loss()`, which
    `graft.train.MontecloraTrainerMixin` or the training loop adds.

    Raises:
        ConfigError: a value out of range.
    """

    num_samples: int = 8  # matrices that one draw of A averages
    use_entropy: bool = False  # the loss has Σ w² of their weights w
    dirichlet_prior: float = 0.1  # concentration of the prior of w
    sample_scaler: float = 1e-4  # of the noise
    kl_loss_weight: float = 1e-5  # of the distance from the priors
    buffer_size: int = 150  # draws that PEFT makes ahead; graft makes each when it is used

    def __post_init__(self) -> None:
        validate(self)
        for name in ("num_samples", "dirichlet_prior", "buffer_size"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"`{name}` must be greater than 0.")
