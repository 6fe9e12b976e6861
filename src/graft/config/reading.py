# SPDX-License-Identifier: Apache-2.0
"""JSON from elsewhere, read with suspicion: its size, depth and numbers are bounded, and no key counts twice."""

from __future__ import annotations

import json
import math
import os
import re
from typing import Any

from graft.core.errors import CheckpointError

LARGEST = 2**24  # bytes of a file
DEEPEST = 32  # containers inside each other
DIGITS = 300  # of a whole number: more do not fit a float
LONG = re.compile(rf"[0-9]{{{DIGITS + 1}}}")


def read_object(path: str | os.PathLike) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        CheckpointError: the file is too large, is no JSON, or holds something else. The text names file and field.
    """
    size = os.path.getsize(path)
    if size > LARGEST:
        raise CheckpointError(f"{path} has {size:,} bytes: a config has at most {LARGEST:,}, so it is none.")
    with open(path, "rb") as f:
        loaded = parsed(f.read(LARGEST + 1), str(path))
    check(loaded, str(path), "", 0)
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not the fields of an adapter.")
    return loaded


def parsed(text: str | bytes, what: str) -> Any:
    """Return the value of a JSON text. `what`: where it stands, for errors.

    Raises:
        CheckpointError: it is no JSON, or nested too deeply for Python.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode()
        return json.loads(text, parse_int=whole if LONG.search(text) else None, object_pairs_hook=once)
    except RecursionError as e:
        raise CheckpointError(f"{what} nests lists and objects more than {DEEPEST} deep: no adapter does.") from e
    except ValueError as e:  # of JSON or UTF-8
        raise CheckpointError(f"{what} is not valid JSON ({e}): it is truncated or was edited by hand.") from e


def whole(digits: str) -> float:
    return int(digits) if len(digits) <= DIGITS else math.inf  # `check` names the field


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return pairs as a dict; raise ValueError if a key stands twice."""
    out = dict(pairs)
    if len(out) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} stands twice")
    return out


def check(value: Any, what: str, field: str, depth: int) -> None:
    """Raise CheckpointError for a number that is not finite, and for too deep a nesting."""
    if isinstance(value, float):
        if not math.isfinite(value):
            raise CheckpointError(f"{what}: the field '{field}' has a number that is too large, infinite or NaN.")
    elif isinstance(value, (dict, list)):
        if depth >= DEEPEST:
            raise CheckpointError(f"{what}: the field '{field}' nests lists and objects more than {DEEPEST} deep.")
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if type(inner) in (float, list, dict):
                check(inner, what, field or str(key), depth + 1)
