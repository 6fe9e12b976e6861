# SPDX-License-Identifier: Apache-2.0
"""Puts a change into the functions of the running process."""

from __future__ import annotations

import functools
import gc
import types
from collections.abc import Iterator

Key = tuple[str, int]  # name and first line


def code_objects(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield a code object and all code objects inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from code_objects(constant)


def by_key(code: types.CodeType) -> dict[Key, types.CodeType]:
    """Return the code objects of a module by name and first line, without those that share both."""
    codes_by_key: dict[Key, list[types.CodeType]] = {}
    for inner in code_objects(code):
        codes_by_key.setdefault((inner.co_name, inner.co_firstlineno), []).append(inner)
    return {key: codes[0] for key, codes in codes_by_key.items() if len(codes) == 1}


class Functions:
    """Every function of graft in this process, by the file and the place of its code, and graft's caches."""

    def __init__(self) -> None:
        """List them. Unfreezes what the garbage collector has frozen, since nothing lists it, and freezes all anew."""
        self.by_place: dict[tuple[str, Key], list[types.FunctionType]] = {}
        self.caches: list[functools._lru_cache_wrapper] = []
        gc.unfreeze()
        for thing in gc.get_objects():
            if type(thing) is types.FunctionType:
                code = thing.__code__
                place = code.co_filename, (code.co_name, code.co_firstlineno)
                self.by_place.setdefault(place, []).append(thing)
            elif type(thing) is functools._lru_cache_wrapper and getattr(thing, "__module__", "").startswith("graft"):
                self.caches.append(thing)
        gc.freeze()

    def patch(self, path: str, old: str, new: str) -> bool:
        """Replace the code of each function of a file whose code differs between two texts. Return False if none could.

        Empties the caches of graft's functions, which may hold results of the old code.
        """
        codes = compile(old, path, "exec"), compile(new, path, "exec")
        before, after = by_key(codes[0]), by_key(codes[1])
        done = False
        for key in before:
            if key not in after or before[key] == after[key]:
                continue
            for function in self.by_place.get((path, key), []):
                if function.__code__.co_freevars == after[key].co_freevars:
                    function.__code__ = after[key]
                    done = True
        for cache in self.caches:
            cache.cache_clear()
        return done
