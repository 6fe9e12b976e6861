# SPDX-License-Identifier: Apache-2.0
"""Which cells of a matrix of laws run by default: a covering array. `make test-all` runs the full product.

Every law meets every sample of every method, every layer type, every storage, and every method on every kind of layer
that it can adapt. Which cell serves which of these depends on the law's name, so that together the laws meet far more.
"""

from __future__ import annotations

import heapq
import os
import zlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

EVERYTHING = os.environ.get("GRAFT_TESTS") == "all"


@dataclass(frozen=True)
class Sometimes:
    """A feature that one law in `of` meets: which ones, its name and the law's decide."""

    feature: Hashable
    of: int

    def by(self, law: str) -> bool:
        return zlib.crc32(f"{law} {self.feature}".encode()) % self.of == 0


class Case(tuple):
    """A cell that is no more than its parts."""

    def __str__(self) -> str:
        return "-".join(map(str, self))


def cover(law: str, cells: Sequence[Any], features: Callable[[Any], Sequence[Hashable]]) -> list[Any]:
    """A few cells that have all the features that any cell has, in their order.

    Greedy: again and again the cell with the most features that are not covered yet. What a cell adds only shrinks, so
    that a cell which still adds what the heap says is the best.
    """
    if EVERYTHING:
        return list(cells)
    order = sorted(range(len(cells)), key=lambda i: zlib.crc32(f"{law} {cells[i]}".encode()))
    have = {i: {f for f in features(cells[i]) if not isinstance(f, Sometimes) or f.by(law)} for i in order}
    left = set().union(*have.values()) if have else set()
    heap = [(-len(have[i]), rank, i) for rank, i in enumerate(order)]
    heapq.heapify(heap)
    chosen = []
    while left:
        said, rank, best = heap[0]
        if (adds := len(have[best] & left)) < -said:
            heapq.heapreplace(heap, (-adds, rank, best))
            continue
        heapq.heappop(heap)
        chosen.append(best)
        left -= have[best]
    return [cells[i] for i in sorted(chosen)]


def law(names: str, cells: Sequence[Any], features: Callable[[Any], Sequence[Hashable]]) -> Callable[[Any], Any]:
    """Decorate a test with the cells that its law meets."""

    def decorate(test: Any) -> Any:
        return pytest.mark.parametrize(names, cover(test.__name__, cells, features), ids=str)(test)

    return decorate
