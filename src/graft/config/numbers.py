# SPDX-License-Identifier: Apache-2.0
"""Bounds of the numbers in a config: it may come from anywhere, and sizes become memory."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from graft.core.errors import ConfigError

LARGEST = 2**24  # of a size or factor
LARGEST_COUNTER = 2**63 - 1  # of a seed, or of steps
MOST_NAMES = 100_000  # entries of a list
MOST_PATTERNS = 10_000  # entries of a dict; each is tried on every layer


def check_numbers(config: Any, hints: dict[str, Any]) -> None:
    """Raise ConfigError for the first dropout outside [0, 1], number that is too large or not finite, or long list.

    Args:
        hints: the types of the config's fields. Those of any type hold what others read, and are not looked into.
    """
    for f in fields(config):
        value = getattr(config, f.name)
        if value is None or isinstance(value, (str, bool)) or anything(hints[f.name]):
            continue
        if f.name.endswith("dropout") and not 0 <= value <= 1:
            raise ConfigError(f"`{f.name}` must be a probability, between 0 and 1, got {value}.")
        if isinstance(value, (list, set, dict)):
            most = MOST_PATTERNS if isinstance(value, dict) else MOST_NAMES
            if len(value) > most:
                raise ConfigError(f"`{f.name}` has {len(value):,} entries: {most:,} is the most.")
        most = LARGEST_COUNTER if f.name in getattr(config, "counters", ()) else LARGEST
        for number in numbers(value):
            if number != number or number in (float("inf"), -float("inf")):
                raise ConfigError(f"`{f.name}` must be a finite number, got {number}.")
            if not -most <= number <= most:
                raise ConfigError(f"`{f.name}` must be between {-most:,} and {most:,}, got {brief(number)}.")


def anything(hint: Any) -> bool:
    """Say whether a type leaves open what a value contains."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(anything(part) for part in typing.get_args(hint))
    return hint in (Any, dict)


def numbers(value: Any) -> Iterator[int | float]:
    """Yield the numbers that a value is or contains."""
    if isinstance(value, (int, float)):
        if not isinstance(value, bool):
            yield value
    elif isinstance(value, (list, tuple, set, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from numbers(inner)


def brief(number: int | float) -> str:
    return str(number) if isinstance(number, float) or number.bit_length() < 80 else "a number of many digits"
