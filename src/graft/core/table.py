# SPDX-License-Identifier: Apache-2.0
"""A table with the qualified names of types for keys, so that it can name types of packages that are not imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")


class TypeTable(Generic[T]):
    """A map from `"package.module.Class"` to an entry. `find` takes the first class of the MRO that has one."""

    def __init__(self, rows: Mapping[str, T]):
        self._rows = dict(rows)
        self._found: WeakKeyDictionary[type, int] = WeakKeyDictionary()  # index in a type's MRO, -1 for none

    def add(self, qualified_name: str, entry: T) -> None:
        self._rows[qualified_name] = entry
        self._found.clear()

    def entry(self, qualified_name: str) -> T:
        return self._rows[qualified_name]

    def names(self) -> list[str]:
        return list(self._rows)

    def find(self, cls: type) -> T | None:
        origin = self.origin(cls)
        return None if origin is None else self._rows[qualified(origin)]

    def origin(self, cls: type) -> type | None:
        """Return the first class of the MRO that has an entry; None if none has."""
        place = self._found.get(cls)
        if place is None:
            places = (i for i, base in enumerate(cls.__mro__) if qualified(base) in self._rows)
            place = self._found[cls] = next(places, -1)
        return cls.__mro__[place] if place >= 0 else None


def qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
