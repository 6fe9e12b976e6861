# SPDX-License-Identifier: Apache-2.0
"""Which cells of a matrix of laws run by default: a covering array. `make test-all` runs the full product.

Every law meets every method, every layer type and every storage; a sample of a method, and a method on a kind of layer
that it can adapt, some of the laws. Which, depends on the law's name, so that together the laws meet far more.
"""

from __future__ import annotations

import heapq
import itertools
import os
import zlib
from collections.abc import Callable, Hashable, Iterable, Sequence
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
        return "-".join(part.__name__ if isinstance(part, type) else str(part) for part in self)


def product(*axes: Iterable[Any]) -> list[Case]:
    """Return the cells of a matrix of these axes."""
    return [Case(cell) for cell in itertools.product(*axes)]


def pairs(case: Case) -> list[Hashable]:
    """What a test of several parameters meets: each value of each beside each value of every other."""
    return list(itertools.combinations(enumerate(case), 2))


Features = Callable[[Any], Sequence[Hashable]]


class Matrix:
    """Cells and their features, read once for all laws that meet them."""

    def __init__(self, cells: Sequence[Any], features: Features):
        self.cells = cells
        self.names = [str(cell).encode() for cell in cells]
        met = [features(cell) for cell in cells]
        self.always = [{f for f in row if not isinstance(f, Sometimes)} for row in met]
        self.sometimes = [[f for f in row if isinstance(f, Sometimes)] for row in met]

    def cover(self, law: str) -> list[Any]:
        """Return a few cells that have all the features that any cell has, in their order.

        Greedy: again and again the cell with the most features that are not covered yet. A cell adds ever fewer, so
        that a cell which still adds as many as the heap says is the best.
        """
        start = zlib.crc32(f"{law} ".encode())
        order = sorted(range(len(self.cells)), key=lambda i: zlib.crc32(self.names[i], start))
        features = {f for row in self.sometimes for f in row}
        meets = {f for f in features if f.by(law)}
        have = [always.union(meets.intersection(row)) for always, row in zip(self.always, self.sometimes, strict=True)]
        left = set().union(*have)
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
        return [self.cells[i] for i in sorted(chosen)]


def cover(law: str, cells: Sequence[Any], features: Features) -> list[Any]:
    """Return a few cells that have all the features that any cell has; all of them for `make test-all`."""
    return list(cells) if EVERYTHING else Matrix(cells, features).cover(law)


def law(
    names: str, cells: Sequence[Any], features: Features, more: tuple[Features, pytest.MarkDecorator] | None = None
) -> Callable[[Any], Any]:
    """Decorate a test with the cells that its law meets; those with `more` features, too, under a mark."""
    matrix = None if EVERYTHING else Matrix(cells, features)

    def decorate(test: Any) -> Any:
        met = matrix.cover(test.__name__) if matrix else list(cells)
        added = [c for c in cover(test.__name__, cells, more[0]) if c not in met] if more else []
        marked = [pytest.param(*(c if "," in names else [c]), marks=more[1], id=str(c)) for c in added]
        return pytest.mark.parametrize(names, [*met, *marked], ids=str)(test)

    return decorate
