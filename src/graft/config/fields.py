# SPDX-License-Identifier: Apache-2.0
"""Config fields that most methods share, and their checks."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from graft.config.base import PeftConfig
from graft.core.errors import ConfigError, ConfigTypeError, PeftWarning, shortened, warn

T = TypeVar("T")
MOST_LISTS = 100  # entries of layers_pattern; each is tried on every module


def as_set(names: list[str] | tuple[str, ...] | set[str] | str | None) -> set[str] | str | None:
    """Return names as a set, a regular expression as it is."""
    return set(names) if isinstance(names, (list, tuple)) else names


@dataclass(kw_only=True)
class Targets(PeftConfig):
    target_modules: list[str] | set[str] | str | None = (
        None  # names, suffixes, one regex, "all-linear", or None: the default of the architecture
    )
    target_parameters: list[str] | None = None  # parameters by their own names: matrices, and stacks (experts)
    modules_to_save: list[str] | None = None  # trained whole and saved with the adapter
    beyond: ClassVar[frozenset[str]] = frozenset({"target_parameters"})

    def __post_init__(self) -> None:
        if isinstance(self.target_parameters, str):
            raise TypeError("`target_parameters` must be a list of strings or None.")
        super().__post_init__()
        self.target_modules = as_set(self.target_modules)


@dataclass(kw_only=True)
class Targeted(Targets):
    exclude_modules: list[str] | set[str] | str | None = None  # names, suffixes or one regex

    def __post_init__(self) -> None:
        super().__post_init__()
        self.exclude_modules = as_set(self.exclude_modules)


@dataclass(kw_only=True)
class Chosen(PeftConfig):
    """`Method.prepare` may choose the modules itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.target_paths: set[str] | None = None  # no field: they hold for one model only


@dataclass(kw_only=True)
class LayerRange(PeftConfig):
    layers_to_transform: list[int] | int | None = None  # indices of the layers to adapt; None: all
    layers_pattern: list[str] | str | None = None  # name of the list that the indices count, such as "layers"

    def __post_init__(self) -> None:
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
class RankPattern(PeftConfig):
    rank_pattern: dict[str, int] | None = field(default_factory=dict)  # rank by layer name or regex
    patterns: ClassVar[dict[str, str]] = {"rank_pattern": "r"}


@dataclass(kw_only=True)
class RankPatterns(RankPattern):
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)  # alpha by layer name or regex
    patterns: ClassVar[dict[str, str]] = {"rank_pattern": "r", "alpha_pattern": "alpha"}

    def __post_init__(self) -> None:
        super().__post_init__()
        name = self.patterns.get("alpha_pattern")
        if name is not None and 0 in (getattr(self, name), *(self.alpha_pattern or {}).values()):
            warn(f"`{name}` is 0 on some or all layers: the adapter has no effect there.", PeftWarning)


def sub_config(value: Any, cls: type[Any]) -> Any:
    """Make the config inside another of the dict that a file has for it; report and leave out keys it does not know."""
    if not isinstance(value, dict):
        return value
    known = {f.name for f in fields(cls) if f.init}
    unknown = sorted(set(value) - {f.name for f in fields(cls)})
    if unknown:
        warn(f"Unexpected keyword arguments {unknown} for class {cls.__name__}, these are ignored.")
    return cls(**{k: v for k, v in value.items() if k in known})


def settings(value: T | dict[str, object] | None) -> T:
    """Return the config inside another where there is one, which is no dict since `sub_config`."""
    assert value is not None and not isinstance(value, dict)
    return value


def whole_number(value: object, name: str) -> int:
    """Convert a whole number of any type, such as NumPy's, to an int. Raises ConfigTypeError for others."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigTypeError(f"{name} must be an int, got {shortened(repr(value))}.") from None
