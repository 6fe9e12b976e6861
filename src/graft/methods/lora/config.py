# SPDX-License-Identifier: Apache-2.0
"""LoraConfig: every field of PEFT 0.21.2."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, ClassVar

from torch import nn

from graft.config.base import PeftConfig
from graft.config.fields import COUNT, BaseBias, FanInFanOut, LayerRange, RankPatterns, Targeted, make_sub_config
from graft.core.errors import ConfigError, warn
from graft.core.ops import OPS, Op
from graft.methods.lora.sub_configs import (
    CONVERTED,
    SETTINGS,
    TITLES,
    VARIANTS,
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraGAConfig,
    MontecloraConfig,
    VeloraConfig,
)


def ops_of(mapping: dict[type[nn.Module], type | Op]) -> dict[type[nn.Module], Op]:
    """Return the `Op` for each type of module: the value itself if it is an Op, else the row of OPS for the type in the
    value.

    Raises TypeError if graft knows no op for the type.
    """
    ops: dict[type[nn.Module], Op] = {}
    for kind, how in mapping.items():
        op = how if isinstance(how, Op) else OPS.find(how)
        if op is None:
            raise TypeError(
                f"{how!r} does not say how {kind.__name__} uses its weight. Give a type that graft knows (nn.Linear, "
                "nn.Embedding, nn.Conv1d to 3d) or a graft.core.ops.Op; adapter layers of PEFT do not run here."
            )
        ops[kind] = op
    return ops


def check_invocation(tokens: list[int], task_type: str | None) -> None:
    """Raise ConfigError if `tokens` is empty or has a negative id; warn if `task_type` is not CAUSAL_LM."""
    if not tokens or min(tokens) < 0:
        raise ConfigError(
            f"`alora_invocation_tokens` must be the ids of one token or more, got {tokens}: aLoRA begins to act "
            "where they stand. Leave it None for an adapter that always acts."
        )
    if task_type != "CAUSAL_LM":
        warn("aLoRA is currently only supported for CAUSAL_LM task.")


def check_loftq(cfg: LoraConfig) -> None:
    """Complete or clear `loftq_config`.

    With init_lora_weights="loftq" it becomes a dict of all fields of LoftQConfig, or ConfigError if it is empty.

    With another initialisation, warn that it is ignored and set it to {}.
    """
    if cfg.init_lora_weights == "loftq":
        if not cfg.loftq_config:
            raise ConfigError("`loftq_config` must be specified when `init_lora_weights` is 'loftq'.")
        cfg.loftq_config = vars(make_sub_config(cfg.loftq_config, LoftQConfig)).copy()
    else:
        warn("`loftq_config` specified but will be ignored when `init_lora_weights` is not 'loftq'.")
        cfg.loftq_config = {}


def check_start(cfg: LoraConfig) -> None:
    """Complete the settings of the initialisation in `cfg`.

    "OLoRA" in any spelling becomes "olora". The dicts `eva_config`, `corda_config` and `lora_ga_config` become their
    classes. Warns, and fills in the defaults, if the initialisation lacks its settings; warns if settings belong to
    another one, and keeps them. `check_loftq` completes `loftq_config`. Warns of rsLoRA with patterns and an
    initialisation that changes the base.

    Raises:
        ConfigError: KaSA with PiSSA by iterations, CorDA or LoRA-GA; `lora_bias` with any initialisation but True and
            False, or with DoRA.
    """
    if str(cfg.init_lora_weights).lower() == "olora":  # which PEFT takes in any spelling
        cfg.init_lora_weights = "olora"
    init = cfg.init_lora_weights
    for name, (how, cls) in SETTINGS.items():
        setattr(cfg, name, make_sub_config(getattr(cfg, name), cls))
        if getattr(cfg, name) is not None and init != how:
            warn(f"`{name}` specified but will be ignored when `init_lora_weights` is not '{how}'.")
        elif getattr(cfg, name) is None and init == how:
            title = TITLES[how]
            warn(f"`init_lora_weights` is '{how}' but `{name}` is not specified. Using default {title} config.")
            setattr(cfg, name, cls())
    if init == "loftq" or cfg.loftq_config:
        check_loftq(cfg)
    if cfg.kasa_config and isinstance(init, str) and init.startswith(("pissa_niter", "corda", "lora_ga")):
        raise ConfigError(
            f"kasa_config does not work with init_lora_weights={init!r}, which gives other values at each load. "
            "Choose another initialisation."
        )
    if cfg.lora_bias and not isinstance(init, bool):
        raise ConfigError(
            "The argument lora_bias=True is only supported with the plain initialisations, True and False, not "
            f"with init_lora_weights={init!r}."
        )
    if cfg.lora_bias and cfg.use_dora:
        raise ConfigError("The argument lora_bias=True is not supported for DoRA, please pass use_dora=False.")
    patterned = cfg.rank_pattern or cfg.alpha_pattern
    if cfg.use_rslora and patterned and isinstance(init, str) and init.startswith(CONVERTED):
        warn(
            "Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern and post-training conversion of "
            "modified base weights: the saved adapter cannot be converted to plain LoRA."
        )


@dataclass
class LoraRuntimeConfig:
    """Choices for this machine, which no file holds."""

    ephemeral_gpu_offload: bool = False


@dataclass(kw_only=True)
class LoraConfig(Targeted, LayerRange, RankPatterns, FanInFanOut, BaseBias):
    """LoRA (arXiv 2106.09685): W x + scaling · B A x, scaling = alpha / r, or alpha / √r (rsLoRA, arXiv 2312.03732).

    Raises:
        ConfigError: a value out of range, or a combination that has no meaning.
        ConfigTypeError: a value of the wrong type.
        NotImplementedError: a variant or initialisation of PEFT that graft does not have yet.
    """

    peft_type: str = "LORA"
    r: Annotated[int, COUNT] = 8  # rank
    lora_alpha: float = 8
    lora_dropout: float = 0.0  # on the input of A
    use_rslora: bool = False
    init_lora_weights: bool | str = True  # True, False, gaussian, orthogonal, olora, pissa, pissa_niter_N, loftq, mica,
    # eva, corda, lora_ga; the last three begin with data
    megatron_config: dict[str, object] | None = None  # graft reads Megatron's layers without it
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None  # embedding rows to train as well
    loftq_config: dict[str, object] | LoftQConfig = field(default_factory=dict)  # becomes a dict, as in files
    eva_config: EvaConfig | dict[str, object] | None = None
    corda_config: CordaConfig | dict[str, object] | None = None
    lora_ga_config: LoraGAConfig | dict[str, object] | None = None
    use_dora: bool = False  # DoRA (arXiv 2402.09353): magnitudes and directions apart
    velora_config: VeloraConfig | dict[str, object] | None = None  # VeLoRA (arXiv 2405.17991): keeps projected inputs
    alora_invocation_tokens: list[int] | None = None  # aLoRA (arXiv 2504.12397): acts from their last occurrence on
    use_qalora: bool = False  # QA-LoRA (arXiv 2309.14717): A sees sums over groups of inputs
    qalora_group_size: int = 16  # inputs in a group
    monteclora_config: MontecloraConfig | dict[str, object] | None = None  # MonteCLoRA (arXiv 2411.04358): a random A
    layer_replication: list[tuple[int, int]] | None = None  # stack these ranges of layers, sharing weights
    runtime_config: LoraRuntimeConfig | dict[str, object] = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False  # B has a bias
    target_parameters: list[str] | None = None  # parameters by their own names: matrices, and stacks (experts)
    use_bdlora: BdLoraConfig | dict[str, object] | None = None  # BD-LoRA (arXiv 2510.23346): A or B is block-diagonal
    arrow_config: ArrowConfig | dict[str, object] | None = None  # a router over adapters: see `create_arrow_model`
    kasa_config: KasaConfig | dict[str, object] | None = (
        None  # KaSA (arXiv 2412.06071): singular values, truncated base
    )
    ensure_weight_tying: bool = False  # adapt tied embeddings together
    use_dylora: bool = False  # DyLoRA (arXiv 2210.07558): steps train the first ranks; no file holds this choice

    _custom_modules: ClassVar[dict[type[nn.Module], Op] | None] = None  # an instance may have its own
    patterns = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
    beyond = frozenset()
    runtime_fields = ("runtime_config", "use_dylora")

    def __post_init__(self) -> None:
        """Validate all fields and complete those that depend on each other; dicts of sub-configs become their classes.

        Raises:
            ConfigError: DoRA with `megatron_config`; a `megatron_core` outside "megatron."; two variants at once;
                invocation tokens or an initialisation that cannot work (`check_invocation`, `check_start`).
        """
        super().__post_init__()
        if self.use_dora and self.megatron_config:
            raise ConfigError("DoRA does not support megatron_core, please set `use_dora=False`.")
        if self.megatron_config and not str(self.megatron_core).startswith("megatron."):
            raise ConfigError(f"megatron_core must name a module of Megatron, 'megatron.core': {self.megatron_core!r}.")
        self.runtime_config = make_sub_config(self.runtime_config, LoraRuntimeConfig)
        self.kasa_config = make_sub_config(self.kasa_config, KasaConfig)
        self.arrow_config = make_sub_config(self.arrow_config, ArrowConfig)
        self.velora_config = make_sub_config(self.velora_config, VeloraConfig)
        self.monteclora_config = make_sub_config(self.monteclora_config, MontecloraConfig)
        self.use_bdlora = make_sub_config(self.use_bdlora, BdLoraConfig)
        if len(self.variants) > 1:
            raise ConfigError(f"Invalid or unsupported variant combination: {self.variants}. Choose one of them.")
        if self.alora_invocation_tokens is not None:
            check_invocation(self.alora_invocation_tokens, self.task_type)
        check_start(self)

    @classmethod
    def from_known_fields(cls, values: dict[str, object]) -> PeftConfig:
        """Return a config from a file's values.

        The key `lora_B_layout`, which Unsloth writes, becomes a plain attribute: it is no field, so graft writes it to
        no file.
        """
        mark = "lora_B_layout"  # Unsloth's, of a file, which `io.layouts` reads
        config = super().from_known_fields({k: v for k, v in values.items() if k != mark})
        vars(config).update({mark: values[mark]} if mark in values else {})  # no field: no file of graft's has it
        return config

    def _register_custom_module(self, mapping: dict[type[nn.Module], type | Op]) -> None:
        """Let injections with this config adapt modules of further types, in addition to those of earlier calls; a type
        named again gets the new entry. No file holds this: call it again before a load.

        Args:
            mapping: type of modules → the type that it works like, such as nn.Linear; or an `Op` that says how it uses
                its weight.

        Raises:
            TypeError: a value is neither, such as a layer class written for PEFT.
        """
        self.__dict__["_custom_modules"] = {**(self._custom_modules or {}), **ops_of(mapping)}

    @property
    def variants(self) -> tuple[str, ...]:
        """Return the names in VARIANTS that the config selects, sorted.

        A name is selected by a true field of that name, or by `init_lora_weights` in any spelling.
        """
        init = self.init_lora_weights
        start = init.lower() if isinstance(init, str) else None
        return tuple(sorted(name for name in VARIANTS if name == start or getattr(self, name, None)))

    def drop_variant(self) -> None:
        """Make this a config of plain LoRA: set each field in `variants` back to its default.

        An `init_lora_weights` of a variant stays.
        """
        selected = self.variants
        for f in fields(self):
            if f.name in selected:
                setattr(self, f.name, f.default)
