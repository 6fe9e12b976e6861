# SPDX-License-Identifier: Apache-2.0
"""A table whose rows are found by a type's qualified name, so that no optional package is imported to fill it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Generic, TypeVar

T = TypeVar("T")


class TypeTable(Generic[T]):
    """Maps `"package.module.Class"` to an entry; `find` takes the first class of the MRO that has one."""

    def __init__(self, rows: Mapping[str, T]):
        self._rows = dict(rows)
        # bounded: some libraries make a class for each module, and should be able to lose it again
        self.find = lru_cache(maxsize=256)(self._find)
        self.origin = lru_cache(maxsize=256)(self._origin)

    def add(self, qualified_name: str, entry: T) -> None:
        self._rows[qualified_name] = entry
        self.find.cache_clear()
        self.origin.cache_clear()

    def names(self) -> list[str]:
        return list(self._rows)

    def _find(self, cls: type) -> T | None:
        origin = self._origin(cls)
        return None if origin is None else self._rows[qualified(origin)]

    def _origin(self, cls: type) -> type | None:
        """The class of the MRO that has an entry."""
        return next((base for base in cls.__mro__ if qualified(base) in self._rows), None)


def qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
