# SPDX-License-Identifier: Apache-2.0
"""A table with the qualified names of types for keys, so that it can name types of packages that are not imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar
from weakref import ref

T = TypeVar("T")
C = TypeVar("C")


class TypeTable(Generic[T]):
    """A map from `"package.module.Class"` to an entry. `find` takes the first class of the MRO that has one."""

    def __init__(self, rows: Mapping[str, T]):
        self._rows = dict(rows)
        # by id, as a WeakKeyDictionary takes three times as long: (type, index in its MRO or -1 for none, entry)
        self._found: dict[int, tuple[ref[type], int, T | None]] = {}

    def add(self, qualified_name: str, entry: T) -> None:
        self._rows[qualified_name] = entry
        self._found.clear()

    def entry(self, qualified_name: str) -> T:
        return self._rows[qualified_name]

    def names(self) -> list[str]:
        return list(self._rows)

    def find(self, cls: type) -> T | None:
        return self._search(cls)[2]

    def origin(self, cls: type[C]) -> type[C] | None:
        """Return the first class of the MRO that has an entry; None if none has."""
        place = self._search(cls)[1]
        return cls.__mro__[place] if place >= 0 else None

    def _search(self, cls: type) -> tuple[ref[type], int, T | None]:
        found = self._found.get(id(cls))
        if found is None or found[0]() is not cls:
            places = (i for i, base in enumerate(cls.__mro__) if qualified(base) in self._rows)
            place = next(places, -1)
            entry = None if place < 0 else self._rows[qualified(cls.__mro__[place])]
            found = self._found[id(cls)] = (ref(cls), place, entry)
        return found


def qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
