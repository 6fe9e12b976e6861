# SPDX-License-Identifier: Apache-2.0
"""What a run found, as a file: `--json` writes it, the tables of the pages and the picture are made of it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import Row

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


def write(path: str, rows: list[Row], versions: str, whole: bool, seconds: float) -> None:
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    found = [
        dict(what=r.what, unit=r.unit, values=r.values, faster=r.faster, over_floor=r.over_floor, goal=str(r.goal))
        | dict(met=r.goal.met(r))
        for r in rows
    ]
    run = f"{time.strftime('%Y-%m-%d')}, {seconds / 60:.0f} minutes, {machine}"
    head = json.dumps({"versions": versions, "run": run, "whole": whole}, ensure_ascii=False).removesuffix("}")
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in found)
    Path(path).write_text(f'{head}, "rows": [\n{lines}\n]}}\n')


def read(path: Path | None = None) -> Run:
    held = json.loads((path or RESULTS).read_text())
    return Run(held["versions"], held["run"], held["whole"], [Found(**row) for row in held["rows"]])


def digest() -> str:
    """What the picture of the run that is shown says that it was drawn from."""
    return hashlib.sha256(RESULTS.read_bytes()).hexdigest()
