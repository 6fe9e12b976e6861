# SPDX-License-Identifier: Apache-2.0
"""Config fields that most methods share, their checks, and the default target_modules by architecture."""

from __future__ import annotations

import json
import operator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from graft.config.base import PeftConfig
from graft.config.bounds import Bound, must_be
from graft.core.errors import ConfigError, ConfigTypeError, PeftWarning, shorten_text, warn

T = TypeVar("T")
MOST_LISTS = 100  # entries of layers_pattern; each is tried on every module

# bounds that many fields have
POSITIVE = must_be("positive", lambda number: number > 0)
COUNT = Bound(POSITIVE.allows, "`{name}` should be a positive integer value but the value passed is {value}{where}")
NOT_NEGATIVE = must_be("non-negative", lambda number: number >= 0)
FRACTION = must_be("between 0 and 1", lambda number: 0 <= number <= 1)
BELOW_1 = must_be("at least 0 and below 1", lambda number: 0 <= number < 1)


def as_set(names: list[str] | tuple[str, ...] | set[str] | str | None) -> set[str] | str | None:
    """Return a list or tuple of names as a set; a set, a text (a regular expression) or None unchanged."""
    return set(names) if isinstance(names, (list, tuple)) else names


@dataclass(kw_only=True)
class Targets(PeftConfig):
    """Config of a method that adapts layers: `target_modules`, `target_parameters` and `modules_to_save`."""

    target_modules: list[str] | set[str] | str | None = (
        None  # names, suffixes, one regex, "all-linear", or None: the default of the architecture
    )
    target_parameters: list[str] | None = None  # parameters by their own names: matrices, and stacks (experts)
    modules_to_save: list[str] | None = None  # trained whole and saved with the adapter
    beyond: ClassVar[frozenset[str]] = frozenset({"target_parameters"})

    def __post_init__(self) -> None:
        """Check the fields, and make a list of `target_modules` a set.

        Raises TypeError first if `target_parameters` is a text.
        """
        if isinstance(self.target_parameters, str):
            raise TypeError("`target_parameters` must be a list of strings or None.")
        super().__post_init__()
        self.target_modules = as_set(self.target_modules)


@dataclass(kw_only=True)
class Targeted(Targets):
    """Targets with `exclude_modules`."""

    exclude_modules: list[str] | set[str] | str | None = None  # names, suffixes or one regex

    def __post_init__(self) -> None:
        """Check the fields, and make lists of `target_modules` and `exclude_modules` sets.

        Raises TypeError if `target_parameters` is a text.
        """
        super().__post_init__()
        self.exclude_modules = as_set(self.exclude_modules)


@dataclass(kw_only=True)
class Chosen(PeftConfig):
    """Config of a method that may choose the modules itself, in `Method.prepare`, which sets `target_paths`."""

    def __post_init__(self) -> None:
        """Check the fields, and set `target_paths` to None.

        It is no field, so no file holds it: the paths are those of one model.
        """
        super().__post_init__()
        self.target_paths: set[str] | None = None


@dataclass(kw_only=True)
class LayerRange(PeftConfig):
    """Config fields that limit the targets to some layers by index."""

    layers_to_transform: list[int] | int | None = None  # indices of the layers to adapt; None: all
    layers_pattern: list[str] | str | None = None  # name of the list that the indices count, such as "layers"

    def __post_init__(self) -> None:
        """Check the fields, after those of the superclass.

        Raises:
            ConfigError: `target_modules` is a text and one of `layers_to_transform` and `layers_pattern` is not None.
                Or `layers_pattern` is a list of more than 100 entries. Or `layers_pattern` is set and
                    `layers_to_transform` is None or empty. Checked in this order.
        """
        super().__post_init__()
        if isinstance(getattr(self, "target_modules", None), str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"`{name}` cannot be used when `target_modules` is a str.")
        if isinstance(self.layers_pattern, list) and len(self.layers_pattern) > MOST_LISTS:
            raise ConfigError(f"`layers_pattern` has {len(self.layers_pattern):,} entries: {MOST_LISTS} is the most.")
        if self.layers_pattern and self.layers_to_transform in (None, []):
            raise ConfigError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")


@dataclass(kw_only=True)
class FanInFanOut(PeftConfig):
    """Config field for layers that store their weight transposed, such as Conv1D."""

    fan_in_fan_out: bool = False  # the layers store (in, out); corrected by layer type


@dataclass(kw_only=True)
class BaseBias(PeftConfig):
    """Config field that lets biases of the base train."""

    bias: str = "none"  # which base biases train: none, all, or "…_only": those of adapted layers


@dataclass(kw_only=True)
class RankPattern(PeftConfig):
    """Config field that overrides the rank `r` by layer."""

    rank_pattern: dict[str, int] | None = field(default_factory=dict)  # rank by layer name or regex
    patterns: ClassVar[dict[str, str]] = {"rank_pattern": "r"}


@dataclass(kw_only=True)
class RankPatterns(RankPattern):
    """Config fields that override the rank `r` and the alpha by layer."""

    alpha_pattern: dict[str, float] | None = field(default_factory=dict)  # alpha by layer name or regex
    patterns: ClassVar[dict[str, str]] = {"rank_pattern": "r", "alpha_pattern": "alpha"}

    def __post_init__(self) -> None:
        """Check the fields.

        Warn if the alpha is 0, in its field or in `alpha_pattern`: the adapter then has no effect on those layers.
        """
        super().__post_init__()
        name = self.patterns.get("alpha_pattern")
        if name is not None and 0 in (getattr(self, name), *(self.alpha_pattern or {}).values()):
            warn(f"`{name}` is 0 on some or all layers: the adapter has no effect there.", PeftWarning)


def make_sub_config(value: Any, cls: type[Any]) -> Any:
    """Return a config of class `cls`, which another config contains, from the dict that a file has for it.

    A value that is no dict is returned unchanged. Keys that `cls` does not know are dropped with one warning; fields
    that its constructor does not take are dropped silently.
    """
    if not isinstance(value, dict):
        return value
    known = {f.name for f in fields(cls) if f.init}
    unknown = sorted(set(value) - {f.name for f in fields(cls)})
    if unknown:
        warn(f"Unexpected keyword arguments {unknown} for class {cls.__name__}, these are ignored.")
    return cls(**{k: v for k, v in value.items() if k in known})


def require_sub_config(value: T | dict[str, object] | None) -> T:
    """Return the value, narrowed for type checkers: a config, neither None nor a dict. Asserts that."""
    assert value is not None and not isinstance(value, dict)
    return value


def to_int(value: object, name: str) -> int:
    """Return a whole number of any type with `__index__`, such as NumPy's or a bool, as an int.

    Raises ConfigTypeError, with `name`, for other values; also for a float such as 2.0.
    """
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigTypeError(f"{name} must be an int, got {shorten_text(repr(value))}.") from None


# default target_modules by architecture (`config.model_type`)


def read_targets() -> dict[str, dict[str, list[str] | str]]:
    """Return the tables of targets.json, read at each call, each as {model_type: targets}.

    A key of the file names several model types.
    """
    tables = json.loads(Path(__file__).with_name("targets.json").read_text("utf-8"))
    return {name: {kind: rows[kinds] for kinds in rows for kind in kinds.split()} for name, rows in tables.items()}


TARGETS = read_targets()
LORA = TARGETS["LORA"]
# mixers with a state, which PEFT has no targets for: the projections around them, and attention as in `LORA`
MIXERS = TARGETS["MIXERS"]
IA3_FEEDFORWARD = TARGETS["IA3_FEEDFORWARD"]
VBLORA = {**TARGETS["ADALORA"], "roberta": ["query", "value"]}
PHI_ATTENTION = {**LORA, "phi": ["q_proj", "v_proj"]}  # VeRA and others: phi without its feed-forward layers
PVERA = {**PHI_ATTENTION, "dinov2": ["query", "value"]}
FROD = {**PHI_ATTENTION, "vit": ["query", "value"]}
FOURIER = {**LORA, "gpt2": ["mlp.c_proj"], "gpt_bigcode": ["mlp.c_proj"]}  # FourierFT, C3A
WAVELET = {k: v for k, v in FOURIER.items() if k not in ("btlm", "rwkv", "rwkv7")}
ADAMSS = {**LORA, "vit": ["query", "value"]}
