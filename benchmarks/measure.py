# SPDX-License-Identifier: Apache-2.0
"""Measuring: graft, PEFT and the floor take turns; process CPU time; medians."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import peft

import graft

LIBS = {"graft": graft, "PEFT": peft}
Turns = Iterator[Callable[[], Any]]  # each item is timed once; what happens between two items is not
TURN = 0.02  # seconds that a turn takes at least


@dataclass(frozen=True)
class Effort:
    """How long to measure one row: turns of each competitor, and seconds after which no more are taken."""

    quick: bool = False

    @property
    def least(self) -> int:
        return 3 if self.quick else 5

    @property
    def most(self) -> int:
        return 5 if self.quick else 25

    @property
    def seconds(self) -> float:
        return 0.4 if self.quick else 4.0


@dataclass(frozen=True)
class Goal:
    """`faster`: PEFT / graft at least; `over_floor`: graft / floor at most; `within`: of an estimate, how far from the
    floor, which is what was measured.

    The second says how near graft is to what can be had: what a good implementation does beside the floor, estimated
    from its parts, whatever graft takes today.
    """

    faster: float | None = None
    over_floor: float | None = None
    within: float | None = None

    def met(self, row: Row) -> bool | None:
        """None if the row lacks a value that the goal is about, or there is no goal."""
        return self.met_by(row.faster, row.over_floor)

    def met_by(self, faster: float | None, over_floor: float | None) -> bool | None:
        """The same of two ratios."""
        tests = []
        if self.faster is not None:
            tests.append(None if faster is None else faster >= self.faster)
        if self.over_floor is not None:
            tests.append(None if over_floor is None else over_floor <= self.over_floor)
        if self.within is not None:
            tests.append(None if over_floor is None else abs(over_floor - 1) <= self.within)
        return all(tests) if tests and None not in tests else None

    def __str__(self) -> str:
        parts = []
        if self.faster is not None:
            parts.append(f"≥ {self.faster:g} ×")
        if self.over_floor is not None:
            parts.append(f"≤ {self.over_floor:g} × floor")
        if self.within is not None:
            parts.append(f"floor ± {100 * self.within:g} %")
        return ", ".join(parts)


@dataclass
class Row:
    """One line of the table: values by competitor ("graft", "PEFT", "floor")."""

    what: str
    values: dict[str, list[float]]
    goal: Goal
    unit: str = "s"

    def median(self, who: str) -> float | None:
        values = self.values.get(who)
        return statistics.median(values) if values else None

    def spread(self, who: str) -> float:
        """Half the middle half of the values, relative to the median."""
        values = self.values[who]
        if len(values) < 3:
            return 0.0
        low, middle, high = statistics.quantiles(values, n=4)
        return (high - low) / 2 / middle if middle else 0.0

    def _ratio(self, a: str, b: str) -> float | None:
        top, bottom = self.median(a), self.median(b)
        return None if top is None or not bottom else top / bottom

    @property
    def faster(self) -> float | None:
        return self._ratio("PEFT", "graft")

    @property
    def over_floor(self) -> float | None:
        return self._ratio("graft", "floor")


@dataclass
class Bench:
    """`turns(graft)`, `turns(peft)` and `floor()` yield what to time."""

    what: str
    turns: Callable[[Any], Turns]
    goal: Goal = field(default_factory=Goal)
    floor: Callable[[], Turns] | None = None
    calls: int = 1  # per turn
    long: bool = False  # left out of quick runs
    once: bool = False  # PEFT takes so many seconds that it gets one turn

    def run(self, effort: Effort) -> Row:
        turns = {name: self.turns(lib) for name, lib in LIBS.items()}
        if self.floor is not None:
            turns["floor"] = self.floor()
        values = take_turns(turns, effort, once=("PEFT",) if self.once else ())
        return Row(self.what, {who: [v / self.calls for v in vs] for who, vs in values.items()}, self.goal)


def take_turns(turns: dict[str, Turns], effort: Effort, once: tuple[str, ...] = ()) -> dict[str, list[float]]:
    """Seconds of CPU time of each competitor, interleaved, each round begun by another: none always follows the same.

    A first turn warms up, but for those measured `once`.
    """
    values: dict[str, list[float]] = {who: [] for who in turns}
    order = list(turns.items())
    for who, it in turns.items():
        if who not in once:
            timed(it)
    spent = 0.0
    for n in range(effort.most):
        if n >= effort.least and spent > effort.seconds:
            break
        for who, it in order[n % len(order) :] + order[: n % len(order)]:
            if not (who in once and values[who]):
                values[who].append(timed(it))
                spent += values[who][-1]
    return values


def timed(turns: Turns) -> float:
    """Seconds of CPU time of a call: the mean of as many as take `TURN` together, as one alone finds caches cold."""
    gc.collect()
    took, n = 0.0, 0
    while took < TURN:
        call = next(turns)
        start = time.process_time()
        kept = call()
        took += time.process_time() - start
        n += 1
        del kept
    return took / n
