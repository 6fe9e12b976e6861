# SPDX-License-Identifier: Apache-2.0
"""The ratios of each row in the last runs of each machine: what slid since then, and which rows never move."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.measure import Goal, Row

HISTORY = Path(__file__).with_name("history.json")
RUNS = 3  # of a machine that are kept for each row
LEAST_NOISE = 0.05  # of a ratio, on a quiet machine
STILL = 0.1  # a row whose ratios of the last runs differ by no more has not moved
SHARE = 5  # one of so many rows that have not moved runs each time


class Ratios(NamedTuple):
    """Of one run of a row: PEFT's time by graft's, and graft's by the floor's. None where that was not measured."""

    day: str
    faster: float | None
    over_floor: float | None

    def meets(self, goal: Goal) -> bool:
        """Return whether these ratios meet a goal; a goal about nothing is not met."""
        return goal.met_by(self.faster, self.over_floor) is True


def name_machine() -> str:
    """Return the name by which runs are kept: architecture and number of cores, as the page of results gives them."""
    return f"{platform.machine()}, {os.cpu_count()} cores"


def read_history(machine: str | None = None) -> dict[str, list[Ratios]]:
    """Return row → its last runs on a machine (this one by default), the oldest first; empty if there are none."""
    history = json.loads(HISTORY.read_text()) if HISTORY.exists() else {}
    return {what: [Ratios(*run) for run in runs] for what, runs in history.get(machine or name_machine(), {}).items()}


def record(rows: list[Row], day: str) -> None:
    """Add a run of this machine to the history, which keeps the last `RUNS` of each row."""
    history = json.loads(HISTORY.read_text()) if HISTORY.exists() else {}
    runs = history.setdefault(name_machine(), {})
    for row in rows:
        ratios = [None if ratio is None else round(ratio, 3) for ratio in (row.faster, row.over_floor)]
        runs[row.what] = [*runs.get(row.what, []), [day, *ratios]][-RUNS:]
    text = ",\n".join(
        f"  {json.dumps(machine)}: {{\n"
        + ",\n".join(f"    {json.dumps(what, ensure_ascii=False)}: {json.dumps(of_row)}" for what, of_row in of_all)
        + "\n  }"
        for machine, of_all in ((machine, sorted(rows.items())) for machine, rows in history.items())
    )
    HISTORY.write_text(f"{{\n{text}\n}}\n")


def measure_noise(row: Row) -> float:
    """Return the share by which a ratio of this row may be off: the sum of its spreads, at least `LEAST_NOISE`."""
    return max(LEAST_NOISE, sum(row.spread(who) for who in row.values if len(row.values[who]) > 2))


def list_losses(rows: list[Row]) -> list[str]:
    """Return a text for each row that is worse than the median of its last runs on this machine, beyond the noise.

    An estimate, whose goal is to be near its floor, is a loss if it misses a goal that one of these runs met.
    """
    history, out = read_history(), []
    for row in rows:
        runs, slack = history.get(row.what, []), 1 + measure_noise(row)
        faster = median_of([run.faster for run in runs])
        over_floor = median_of([run.over_floor for run in runs])
        if row.goal.within is not None:
            lost = row.goal.met(row) is False and any(run.meets(row.goal) for run in runs)
        else:
            slow = faster is not None and row.faster is not None and row.faster * slack < faster
            far = over_floor is not None and row.over_floor is not None and row.over_floor > over_floor * slack
            # a faster PEFT or floor alone is none: both ratios worsen where graft is slower
            lost = (slow or faster is None) and (far or over_floor is None) and (slow or far)
        if lost:
            now = f"PEFT / graft {row.faster or 0:.2f}, graft / floor {row.over_floor or 0:.2f}"
            was = f"{faster or 0:.2f} and {over_floor or 0:.2f} in the last {len(runs)} runs"
            out.append(f"{row.what}: {now}, {was}, beyond {100 * (slack - 1):.0f} % of noise")
    return out


def median_of(values: list[float | None]) -> float | None:
    """Return the median of the values that are there, or None if there are none."""
    there = [value for value in values if value is not None]
    return median(there) if there else None


def is_still(runs: list[Ratios], goal: Goal) -> bool:
    """Return whether a row has `RUNS` runs, meets its goal in the last, and had ratios within `STILL` in all."""
    if len(runs) < RUNS or not runs[-1].meets(goal):
        return False
    ratios = [[run[i] for run in runs if run[i]] for i in (1, 2)]
    return all(max(values) / min(values) <= 1 + STILL for values in ratios if values)


def sample_rows(goals: dict[str, Goal]) -> set[str]:
    """Return the rows of a run that need not be whole: all that moved or missed their goal, and one of `SHARE` others.

    Which of the others depends on their last days: those that ran longest ago come first.
    """
    history = read_history()
    still = [what for what, goal in goals.items() if is_still(history.get(what, []), goal)]
    still.sort(key=lambda what: history[what][-1].day)
    return goals.keys() - set(still[-(-len(still) // SHARE) :])


def list_goals_met_once(goals: dict[str, Goal]) -> dict[str, str]:
    """Return row → its goal, of those that one of the last runs met, on any machine."""
    machines = json.loads(HISTORY.read_text()) if HISTORY.exists() else {}
    runs = [(what, run) for machine in machines for what, of_row in read_history(machine).items() for run in of_row]
    return {what: str(goals[what]) for what, run in runs if what in goals and run.meets(goals[what])}
