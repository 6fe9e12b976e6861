# SPDX-License-Identifier: Apache-2.0
"""Checks of lists of adapters' names that callers pass, and the names of parameters that are biases."""

from __future__ import annotations

from collections.abc import Iterable


def as_name_list(names: str | Iterable[str], argument: str) -> list[str]:
    """Return a list of names: `[names]` for one string, else `check_name_list(names, argument)` with its errors."""
    return [names] if isinstance(names, str) else check_name_list(names, argument)


def check_name_list(names: Iterable[str], argument: str) -> list[str]:
    """Return a new list of the names in `names`. `argument` is the caller's name for them, for errors.

    Raises:
        TypeError: `names` is a string, or holds an item that is no string.
        ValueError: a name is in it twice.
    """
    if isinstance(names, str):
        raise TypeError(f"{argument} should be a list of strings, got {names!r}. Write ['{names}'].")
    names = list(names)
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise TypeError(f"{argument} takes names of adapters, got {wrong[0]!r} of type {type(wrong[0]).__name__}.")
    repeats = sorted({name for name in names if names.count(name) > 1})
    if repeats:
        raise ValueError(f"{argument} holds {repeats} twice, and an adapter acts once. Name each adapter one time.")
    return names


def is_bias(name: str) -> bool:
    """Return True if the last part of a dotted parameter name is "bias".

    `bias="all"` trains and saves these, as in PEFT.
    """
    return name.rpartition(".")[2] == "bias"
