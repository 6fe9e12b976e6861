# SPDX-License-Identifier: Apache-2.0
"""The tensors in what a model returns, whatever holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Any

from torch import Tensor, nn

LIMIT = 100_000  # objects of an output that `tensors_in` visits


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Yield the tensors in containers and in attributes of objects, such as dataclasses and caches, but not modules."""
    seen: set[int] = set()
    found = [output]
    while found and len(seen) < LIMIT:
        part = found.pop()
        if isinstance(part, (str, bytes, int, float, NoneType, nn.Module, type)) or id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, Tensor):
            yield part
            continue
        if isinstance(part, Mapping):
            found += part.values()
        elif isinstance(part, (list, tuple, set, frozenset)):
            found += part
        found += getattr(part, "__dict__", {}).values()
