# SPDX-License-Identifier: Apache-2.0
"""The variants and initialisations of a LoraConfig, and the configs within it that set how one of them works."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from graft.config.base import validate
from graft.config.bounds import Bound, at_least, must_be, one_of
from graft.config.fields import NOT_NEGATIVE, POSITIVE
from graft.core.errors import ConfigError

TOP_K = Bound(POSITIVE.allows, "top_k cannot be negative.")
TEMPERATURE = Bound(POSITIVE.allows, "router_temperature must be greater than 0.")
GROUPS = Bound(POSITIVE.allows, "`{name}` should be positive, got {value}.")
ABOVE_0 = Bound(POSITIVE.allows, "`{name}` must be greater than 0.")
RHO = must_be(">= 1.0", lambda rho: rho >= 1)
TAU = must_be("between 0.0 and 1.0", lambda tau: 0 <= tau <= 1)
INIT_TYPE = Bound(
    ("batch_average", "batch_average_once", "random").__contains__,
    "Unsupported `{name}` {value!r}. Supported values are batch_average, batch_average_once and random.",
)


@dataclass
class Settings:
    """A config within another.

    Raises:
        ConfigError: a value out of range.
        ConfigTypeError: a value of the wrong type.
    """

    def __post_init__(self) -> None:
        """Validate types and bounds of all fields."""
        validate(self)


@dataclass
class KasaConfig(Settings):
    """Weights of KaSA's regularisation, `LoraModel._get_kasa_loss()`, which the training loop adds to its loss.

    Raises:
        ConfigError: a weight is negative.
    """

    beta: Annotated[float, NOT_NEGATIVE] = 1e-4  # of ‖d‖²
    gamma: Annotated[float, NOT_NEGATIVE] = 1e-3  # of ‖Bᵀ B - 1‖ + ‖A Aᵀ - 1‖


@dataclass
class ArrowConfig(Settings):
    """Arrow (arXiv 2405.11157): the most fitting experts for each token; GenKnowSub (2025.acl-short.54).

    Raises:
        ConfigError: a number is not positive.
    """

    top_k: Annotated[int, TOP_K] = 3  # experts for each token
    router_temperature: Annotated[float, TEMPERATURE] = 1.0  # of the softmax over them
    use_gks: bool = False  # experts act without general knowledge
    task_adapter_names: list[str] | None = field(default=None, init=False)  # `create_arrow_model` notes both
    gks_adapter_names: list[str] | None = field(default=None, init=False)
    rng_seed: int | None = None  # of the power iteration's start


@dataclass
class BdLoraConfig(Settings):
    """Which factors BD-LoRA makes block-diagonal: the ones that a server splits over its devices.

    For row-sharded modules (output and down projections) that is A, for column-sharded ones (q, k, v, up, gate) B.

    Raises:
        ConfigError: a pattern is in both lists, or `nblocks` is not positive.
    """

    target_modules_bd_a: list[str] | None = None  # parts of module paths where A is block-diagonal
    target_modules_bd_b: list[str] | None = None  # the same for B
    nblocks: Annotated[int, GROUPS] = 1  # how many blocks such a factor has
    match_strict: bool = True  # an adapted module that fits no pattern is an error; else it gets plain LoRA

    def __post_init__(self) -> None:
        """Validate the fields; raise ConfigError if a pattern is in both lists."""
        super().__post_init__()
        a, b = self.target_modules_bd_a, self.target_modules_bd_b
        if set(a or ()) & set(b or ()):
            raise ConfigError(f"Found overlapping modules in target_modules_bd lists: {a} (A) and {b} (B).")


@dataclass
class VeloraConfig(Settings):
    """The parts of the inputs of A that VeLoRA keeps for the backward pass.

    Raises:
        ConfigError: a value out of range.
    """

    num_groups: Annotated[int, GROUPS] = 64  # numbers kept of each input vector: more take more memory
    scale: Annotated[float, GROUPS] = 1.0  # of the inputs put together again from them
    init_type: Annotated[str, INIT_TYPE] = "batch_average"  # direction: of each batch, of the first, random


@dataclass
class MontecloraConfig(Settings):
    """How MonteCLoRA draws A in training, and weights of its loss, `LoraModel._get_monteclora_loss()`, which
    `graft.train.MontecloraTrainerMixin` or the training loop adds.

    Raises:
        ConfigError: a value out of range.
    """

    num_samples: Annotated[int, ABOVE_0] = 8  # matrices that one draw of A averages
    use_entropy: bool = False  # the loss has Σ w² of their weights w
    dirichlet_prior: Annotated[float, ABOVE_0] = 0.1  # concentration of the prior of w
    sample_scaler: float = 1e-4  # of the noise
    kl_loss_weight: float = 1e-5  # of the distance from the priors
    buffer_size: Annotated[int, ABOVE_0] = 150  # draws that PEFT makes ahead; graft makes each when it is used


@dataclass
class LoftQConfig(Settings):
    """LoftQ (arXiv 2310.08659): the base weight is quantized, and A, B begin with the error of that.

    Raises:
        ConfigError: a value out of range.
    """

    loftq_bits: Annotated[int, one_of(4, 8)] = 4  # 4: NF4 in blocks of 64; 8: integers, a scale for each row
    loftq_iter: Annotated[int, at_least(1)] = 1  # rounds of quantizing and decomposing


@dataclass
class EvaConfig(Settings):
    """EVA (arXiv 2410.07170): A begins with principal components of a layer's inputs; ranks go where variance is.

    Raises:
        ConfigError: a value out of range.
    """

    rho: Annotated[float, RHO] = 2.0  # a layer's rank can grow to rho · r
    tau: Annotated[float, TAU] = 0.99  # a component with this cosine similarity to the batch before has converged
    use_label_mask: bool = True  # leave out tokens with the label `label_mask_value`
    label_mask_value: int = -100
    whiten: bool = False  # divide components by the roots of their singular values
    adjust_scaling_factors: bool = True  # change alpha with the rank, so that the scaling stays


@dataclass
class CordaConfig(Settings):
    """CorDA (arXiv 2406.05223): A, B begin with singular triples of W C, where C is the covariance of the inputs.

    Raises:
        ConfigError: an unknown `corda_method`.
    """

    cache_file: str | None = None  # the triples, written once and read afterwards
    covariance_file: str | None = None  # the covariances, likewise; they serve any rank
    corda_method: Annotated[str, one_of("ipm", "kpm")] = "ipm"  # the largest triples, to learn; the smallest, to keep
    verbose: bool = False  # show a progress bar
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True  # accepted as in PEFT; graft leaves no such fields on modules


@dataclass
class LoraGAConfig(Settings):
    """LoRA-GA (arXiv 2407.05000): A, B begin with singular vectors of the weight's gradient.

    Raises:
        ConfigError: an unknown name, or `stable_gamma` is not positive.
    """

    direction: Annotated[str, one_of("ArBr", "A2rBr", "ArB2r", "random")] = "ArB2r"  # the vectors, of 2r, in A and B
    scale: Annotated[str, one_of("stable", "weight_svd", "gd_scale", "unit")] = "stable"
    stable_gamma: Annotated[int, POSITIVE] = 16  # of "stable"


VARIANTS = {  # field or init_lora_weights that selects it → "module:Class" in this folder
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
