# SPDX-License-Identifier: Apache-2.0
"""Names of adapters, as callers give them; and which names are those of biases."""

from __future__ import annotations

from collections.abc import Iterable


def as_name_list(names: str | Iterable[str], argument: str) -> list[str]:
    """Return names as a list; one name may stand for a list of it. Raises as `several`."""
    return [names] if isinstance(names, str) else check_name_list(names, argument)


def check_name_list(names: Iterable[str], argument: str) -> list[str]:
    """Return names as a list.

    Raises:
        TypeError: it is a string, or holds something that is no name.
        ValueError: a name is there twice: an adapter acts once.
    """
    if isinstance(names, str):
        raise TypeError(f"{argument} should be a list of strings, got {names!r}: write ['{names}'].")
    listed = list(names)
    if len(listed) > 1 or not all([isinstance(name, str) for name in listed]):
        check_unique_names(listed, argument)
    return listed


def check_unique_names(names: list[str], argument: str) -> None:
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise TypeError(f"{argument} takes names of adapters, got {wrong[0]!r} of type {type(wrong[0]).__name__}.")
    repeats = sorted({name for name in names if names.count(name) > 1})
    if repeats:
        raise ValueError(f"{argument} holds {repeats} twice, and an adapter acts once: name each adapter one time.")


def is_bias(name: str) -> bool:
    """Return True if a parameter of that name is one of those that `bias="all"` trains and saves, as in PEFT."""
    return name.rpartition(".")[2] == "bias"
