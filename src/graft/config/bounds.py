# SPDX-License-Identifier: Apache-2.0
"""Bounds of the values in configs: `Bound` for single fields, in their annotations, and limits for all numbers and
lists.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Any

from graft.config.reading import LARGEST_NUMBER
from graft.core.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

LARGEST_COUNTER = 2**63 - 1  # of a seed, or of steps
MOST_NAMES = 100_000  # entries of a list
MOST_PATTERNS = 10_000  # entries of a dict; each is tried on every layer


@dataclass(frozen=True)
class Bound:
    """The values that a config's field may have, apart from None: `p: Annotated[float, FRACTION] = 0.5`.

    Args:
        allows: returns True for an allowed value.
        text: the error's text. {name} is the field, {value} its value, {where} the pattern that has the value.
    """

    allows: Callable[[Any], bool]
    text: str

    def check(self, name: str, value: object, where: str = "") -> None:
        """Raise ConfigError if a value is neither None nor allowed.

        `name` is the field, `where` such as " in rank_pattern['q_proj']".
        """
        if value is not None and not self.allows(value):
            raise ConfigError(self.text.format(name=name, value=value, where=where))


def must_be(words: str, allows: Callable[[Any], bool]) -> Bound:
    """Return a bound with the error "`field` must be <words>, got <value>"."""
    return Bound(allows, f"`{{name}}` must be {words}, got {{value}}{{where}}.")


def at_least(least: float) -> Bound:
    """Return a bound that allows numbers from `least` upwards."""
    return must_be(f"at least {least}", lambda number: number >= least)


def one_of(*values: object) -> Bound:
    """Return a bound that allows these values only."""
    return Bound(values.__contains__, f"`{{name}}` must be one of {', '.join(map(repr, values))}, got {{value!r}}.")


@cache
def bounds_of(cls: type) -> dict[str, Bound]:
    """Return the bounds in the annotations of a class and its bases, by field; a subclass overrides its bases.

    Cached.
    """
    bounds: dict[str, Bound] = {}
    for base in reversed(cls.__mro__):
        for name, hint in typing.get_type_hints(base, include_extras=True).items():
            bounds.update((name, mark) for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Bound))
    return bounds


def check_bounds(config: DataclassInstance) -> None:
    """Raise ConfigError for the first value outside its field's bound.

    Values in patterns (`rank_pattern`) have the bound of the field that they override.
    """
    bounds = bounds_of(type(config))
    for name, bound in bounds.items():
        bound.check(name, getattr(config, name))
    for pattern_field, name in getattr(config, "patterns", {}).items():
        for pattern, value in (getattr(config, pattern_field) or {}).items() if name in bounds else ():
            bounds[name].check(name, value, f" in {pattern_field}['{pattern}']")


def check_numbers(config: DataclassInstance, hints: dict[str, object]) -> None:
    """Raise ConfigError for the first field with a value that no config can have.

    - a field that ends in "dropout": outside [0, 1]
    - a dict of more than `MOST_PATTERNS` (10,000) entries, a list or set of more than `MOST_NAMES` (100,000)
    - a number, also within containers: infinite, NaN, or with an absolute value above `LARGEST_NUMBER` (2²⁴), or above
      `LARGEST_COUNTER` (2⁶³ − 1) for fields in the config's `counters`

    None, texts and bools are skipped.

    Args:
        hints: the types of the config's fields. Fields of any type, or of a bare dict, are skipped: other code reads
            them.
    """
    for f in fields(config):
        value = getattr(config, f.name)
        if value is None or isinstance(value, (str, bool)) or allows_anything(hints[f.name]):
            continue
        if f.name.endswith("dropout") and not 0 <= value <= 1:
            raise ConfigError(f"`{f.name}` must be a probability, between 0 and 1, got {value}.")
        if isinstance(value, (list, set, dict)):
            most = MOST_PATTERNS if isinstance(value, dict) else MOST_NAMES
            if len(value) > most:
                raise ConfigError(f"`{f.name}` has {len(value):,} entries: {most:,} is the most.")
        most = LARGEST_COUNTER if f.name in getattr(config, "counters", ()) else LARGEST_NUMBER
        for number in iterate_numbers(value):
            if number != number or number in (float("inf"), -float("inf")):
                raise ConfigError(f"`{f.name}` must be a finite number, got {number}.")
            if not -most <= number <= most:
                raise ConfigError(f"`{f.name}` must be between {-most:,} and {most:,}, got {format_number(number)}.")


def allows_anything(hint: object) -> bool:
    """Return True if a type is Any or a bare `dict`, or a union that contains one."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(allows_anything(part) for part in typing.get_args(hint))
    return hint in (Any, dict)


def iterate_numbers(value: object) -> Iterator[int | float]:
    """Yield the numbers that a value is or contains, at any depth of lists, tuples, sets and dicts.

    Of dicts these are the values, not the keys. Bools and values of any other type give nothing.
    """
    if isinstance(value, (int, float)):
        if not isinstance(value, bool):
            yield value
    elif isinstance(value, (list, tuple, set, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from iterate_numbers(inner)


def format_number(number: int | float) -> str:
    """Return a number as text; "a number of many digits" for an int of 80 bits or more."""
    return str(number) if isinstance(number, float) or number.bit_length() < 80 else "a number of many digits"
