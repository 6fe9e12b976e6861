# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks [--quick] [--only SUBSTRING] [--json FILE] [--plot FILE] [--check]`: which goals are met."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from contextlib import suppress

import peft
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import graft
from benchmarks import (
    experts,
    files,
    guard,
    imports,
    inference,
    injection,
    memory,
    merging,
    methods,
    mixtures,
    serving,
    switching,
    training,
    weighted,
)
from benchmarks.measure import Effort, Row
from benchmarks.plots import draw

BENCHES = [
    bench
    for group in (
        imports,
        injection,
        files,
        switching,
        merging,
        weighted,
        memory,
        training,
        methods,
        inference,
        experts,
        mixtures,
        serving,
    )
    for bench in group.BENCHES
]
COLUMNS = ("graft", "PEFT", "floor")


def show(value: float | None, spread: float, unit: str) -> str:
    """12.3 ms ±4 %"""
    if value is None:
        return ""
    if unit == "×":
        return f"{value:.2f} ×"
    if unit == "B":
        return f"{value / 1e6:.1f} MB"
    scale, name = (1, "s") if value >= 1 else (1e3, "ms")
    text = f"{value * scale:.3g}" if value * scale < 100 else f"{value * scale:.0f}"
    return f"{text} {name}" + (f" ±{100 * spread:.0f} %" if spread >= 0.01 else "")


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def table(rows: list[Row], title: str) -> Table:
    made = Table(title=title, title_justify="left")
    for name in ("what", *COLUMNS, "PEFT / graft", "graft / floor", "goal", "met"):
        made.add_column(name, justify="left" if name in ("what", "goal", "met") else "right", no_wrap=name == "what")
    for row in rows:
        cells = [show(row.median(who), row.spread(who) if who in row.values else 0, row.unit) for who in COLUMNS]
        ratios = [
            f"{r:.2f}" if r is not None and r < 10 else f"{r:.0f}" if r else "" for r in (row.faster, row.over_floor)
        ]
        met = {True: "[green]yes[/]", False: "[red]no[/]", None: "–"}[row.goal.met(row)]
        made.add_row(row.what, *cells, *ratios, str(row.goal), met)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="graft and PEFT side by side.")
    parser.add_argument("--only", metavar="SUBSTRING", default="", help="rows whose name contains this")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, and not the slowest rows")
    parser.add_argument("--json", metavar="FILE", help="write all values")
    parser.add_argument("--plot", metavar="FILE", help="draw all rows")
    parser.add_argument("--check", action="store_true", help="fail if a goal that was met once is lost")
    parser.add_argument("--record", action="store_true", help="note which goals are met, for --check")
    options = parser.parse_args()
    torch.set_num_threads(1)
    named = [b for b in BENCHES if options.only.lower() in b.what.lower()]
    chosen = [b for b in named if not (options.quick and b.long)]
    if not chosen:
        why = "only rows that --quick leaves out contain" if named else "no row contains"
        parser.error("\n  ".join([f"{why} {options.only!r}. Rows:", *(b.what for b in named or BENCHES)]))
    console = Console(width=None if Console().is_terminal else 170)
    rows: list[Row] = []
    with Progress(console=console, transient=True) as progress, suppress(KeyboardInterrupt):  # what there is, is shown
        task = progress.add_task("", total=len(chosen))
        for bench in chosen:
            progress.update(task, description=bench.what)
            torch.manual_seed(0)
            rows.append(bench.run(Effort(options.quick)))
            progress.advance(task)
    versions = f"graft {graft.__version__}, PEFT {peft.__version__}, torch {torch.__version__}, one thread"
    console.print(table(rows, f"CPU time, medians ± half the interquartile range. {versions}"))
    if options.json:
        found = [
            dict(what=r.what, unit=r.unit, values=r.values, faster=r.faster, over_floor=r.over_floor, goal=str(r.goal))
            | dict(met=r.goal.met(r))
            for r in rows
        ]
        with open(options.json, "w") as f:
            json.dump({"versions": versions, "machine": platform.machine(), "rows": found}, f, indent=1)
    if options.plot:
        draw(rows, options.plot, versions)
    if options.record:
        guard.record(rows)
    if options.check:
        gone = guard.lost(rows)
        if gone:
            console.print("[red]Goals that were met and are lost:[/]", *gone, sep="\n  ")
            sys.exit(1)


if __name__ == "__main__":
    main()
