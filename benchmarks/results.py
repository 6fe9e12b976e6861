# SPDX-License-Identifier: Apache-2.0
"""What a run found, as a file: `--json` writes it, the tables of the pages and the picture are made of it.

`python -m benchmarks.results WHOLE AGAIN…` writes results.json of the files of a whole run and of rows that ran again
after it, by today's goals, and adds them to the history.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import Goal, Row

RESULTS = Path(__file__).with_name("results.json")  # the run that docs/performance.md and README show


@dataclass(frozen=True)
class Found:
    """One row of a run. Its ratios are those of the run: a file may hold rounded values."""

    what: str
    unit: str
    values: dict[str, list[float]]
    faster: float | None
    over_floor: float | None
    goal: str
    met: bool | None

    def median(self, who: str) -> float | None:
        values = self.values.get(who)
        return statistics.median(values) if values else None


@dataclass(frozen=True)
class Run:
    versions: str
    run: str  # when, where, for how long
    whole: bool  # neither --quick nor --only
    rows: list[Found]

    def row(self, what: str) -> Found:
        return next(r for r in self.rows if r.what == what)


def write(path: str | Path, rows: list[Row], versions: str, whole: bool, seconds: float) -> None:
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    put(path, rows, versions, f"{time.strftime('%Y-%m-%d')}, {seconds / 60:.0f} minutes, {machine}", whole)


def put(path: str | Path, rows: list[Row], versions: str, run: str, whole: bool) -> None:
    found = [
        dict(what=r.what, unit=r.unit, values=r.values, faster=r.faster, over_floor=r.over_floor, goal=str(r.goal))
        | dict(met=r.goal.met(r))
        for r in rows
    ]
    head = json.dumps({"versions": versions, "run": run, "whole": whole}, ensure_ascii=False).removesuffix("}")
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in found)
    Path(path).write_text(f'{head}, "rows": [\n{lines}\n]}}\n')


def read(path: Path | None = None) -> Run:
    held = json.loads((path or RESULTS).read_text())
    return Run(held["versions"], held["run"], held["whole"], [Found(**row) for row in held["rows"]])


def joined(goals: dict[str, Goal], whole: Run, again: list[Run]) -> tuple[list[Row], str]:
    """The rows of a whole run, judged by `goals`, those that ran again by what they gave then; and a text on the run.

    A row that has no goal any more is left out: it has another name now, and ran again under that.
    """
    later = {row.what: row for run in again for row in run.rows}
    found = {row.what: row for row in whole.rows} | later
    rows = [Row(what, found[what].values, goal, found[what].unit) for what, goal in goals.items() if what in found]
    days = sorted({run.run.split(",")[0] for run in again})
    names = "; ".join(dict.fromkeys(what.split(",")[0].split(" (")[0] for what in goals if what in later))
    return rows, f"{whole.run}; {len(later)} rows ran again, one by one, on {' and '.join(days)}: {names}"


def main(whole: str, *again: str) -> None:
    from benchmarks import guard
    from benchmarks.rows import BENCHES

    first = read(Path(whole))
    rows, text = joined({b.what: b.goal for b in BENCHES}, first, [read(Path(file)) for file in again])
    put(RESULTS, rows, first.versions, text, first.whole)
    guard.record(rows, time.strftime("%Y-%m-%d"))


if __name__ == "__main__":
    main(*sys.argv[1:])
