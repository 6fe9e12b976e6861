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


def patch_process(path: str, old: str, new: str) -> bool:
    """Replace the code of every function of a file whose code differs between two texts. Return False if none could be.

    Unfreezes the objects of the garbage collector. Empties the caches of graft's functions, which may hold results of
    the old code.
    """
    codes = compile(old, path, "exec"), compile(new, path, "exec")
    before, after = by_key(codes[0]), by_key(codes[1])
    differing = {key for key in before if key in after and before[key] != after[key]}
    done = False
    gc.unfreeze()  # tests/conftest.py freezes them, and then nothing lists them
    for function in [f for f in gc.get_objects() if type(f) is types.FunctionType]:
        key = function.__code__.co_name, function.__code__.co_firstlineno
        if function.__code__.co_filename != path or key not in differing:
            continue
        if function.__code__.co_freevars == after[key].co_freevars:
            function.__code__ = after[key]
            done = True
    for cached in [c for c in gc.get_objects() if type(c) is functools._lru_cache_wrapper]:
        if getattr(cached, "__module__", "").startswith("graft"):
            cached.cache_clear()
    return done
