# SPDX-License-Identifier: Apache-2.0
"""A table whose rows are found by a type's qualified name, so that no optional package is imported to fill it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")


class TypeTable(Generic[T]):
    """Maps `"package.module.Class"` to an entry; `find` takes the first class of the MRO that has one."""

    def __init__(self, rows: Mapping[str, T]):
        self._rows = dict(rows)
        self._found: WeakKeyDictionary[type, T | None] = WeakKeyDictionary()

    def add(self, qualified_name: str, entry: T) -> None:
        self._rows[qualified_name] = entry
        self._found.clear()

    def origin(self, cls: type) -> type | None:
        """The class of the MRO that has an entry."""
        return next((base for base in cls.__mro__ if f"{base.__module__}.{base.__qualname__}" in self._rows), None)

    def names(self) -> list[str]:
        return list(self._rows)

    def find(self, cls: type) -> T | None:
        if cls not in self._found:
            names = (f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__)
            self._found[cls] = next((self._rows[n] for n in names if n in self._rows), None)
        return self._found[cls]
