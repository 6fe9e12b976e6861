# SPDX-License-Identifier: Apache-2.0
"""A run of the model that is about to begin, as methods see it that surround it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

from torch import Tensor, nn

from graft.core.rows import Rows

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


@dataclass
class Run:
    """A run of the model that is about to begin, for `Method.around`, which may change `kwargs`."""

    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]
    own: dict[str, Any]  # arguments that are graft's and not the model's
    rows: Rows | None = None
    generates: bool = False  # the model's `generate` runs, and it its forward several times
    copies: int = 1  # of each row, which `generate` makes
    adapters: Sequence[str] = ()  # those that act and are of the class whose `around` is called

    def argument(self, name: str) -> Any:
        """Return an argument of the model; the caller need not name the first."""
        value = self.kwargs.get(name)
        return self.inputs[0] if value is None and name == "input_ids" and self.inputs else value


def copies_of(model: Any, kwargs: Mapping[str, Any]) -> int:
    """Return how often the `generate` of a model repeats each row: for beams, or for several samples."""
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    settings = ("num_beams", "num_return_sequences")
    return max(kwargs.get(s) or getattr(config, s, None) or 1 for s in settings)
