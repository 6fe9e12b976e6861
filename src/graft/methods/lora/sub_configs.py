# SPDX-License-Identifier: Apache-2.0
"""What a LoraConfig chooses between, and the configs within it that set how one variant works."""

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


def require(name: str, value: object, known: tuple[object, ...]) -> None:
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


VARIANTS = {  # field, or value of init_lora_weights, that selects it → "module:Class" beside this
    "use_dora": "dora:DoRA",
    "kasa_config": "kasa:KaSA",
    "alora_invocation_tokens": "alora:ALoRA",
    "arrow_config": "arrow:Arrow",
    "use_bdlora": "bdlora:BdLoRA",
    "velora_config": "velora:VeLoRA",
    "monteclora_config": "monteclora:MonteCLoRA",
    "mica": "mica:MiCA",
    "use_qalora": "qalora:QALoRA",
    "use_dylora": "dylora:DyLoRA",
}

CONVERTED = ("pissa", "olora", "corda", "lora_ga")  # inits that take B A out of the base weight
TITLES = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "lora_ga": "LoRA-GA", "loftq": "LoftQ", "eva": "EVA"}
# field with the settings of one init → (that init, class of the settings)
SETTINGS: dict[str, tuple[str, type[EvaConfig | CordaConfig | LoraGAConfig]]] = {
    "eva_config": ("eva", EvaConfig),
    "corda_config": ("corda", CordaConfig),
    "lora_ga_config": ("lora_ga", LoraGAConfig),
}
