# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks [--help]`: graft and PEFT side by side, and which goals are met.

Without `--all`, `--quick` and `--only`, rows that never moved are sampled: see `benchmarks.guard`.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from contextlib import suppress

import peft
import torch
from rich.console import Console
from rich.progress import Progress

import graft
from benchmarks import guard, packed, results, tables
from benchmarks.measure import Effort, Row
from benchmarks.plots import draw
from benchmarks.rows import BENCHES


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="graft and PEFT side by side.")
    parser.add_argument(
        "--only", metavar="SUBSTRING", nargs="+", default=[""], help="rows whose name contains one of these"
    )
    parser.add_argument("--all", action="store_true", help="also all rows that moved in none of the last three runs")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, and not the slowest rows")
    parser.add_argument("--json", metavar="FILE", help="write all values")
    parser.add_argument("--plot", metavar="FILE", help="draw all rows")
    parser.add_argument("--check", action="store_true", help="fail if a row is slower than in the last three runs")
    parser.add_argument("--record", action="store_true", help="keep the ratios in benchmarks/history.json, for --check")
    options = parser.parse_args()
    torch.set_num_threads(1)
    named = [b for b in BENCHES if any(part.lower() in b.what.lower() for part in options.only)]
    whole = options.all or options.quick or options.only != [""]
    sampled = {b.what for b in named} if whole else guard.sample_rows({b.what: b.goal for b in named})
    chosen = [b for b in named if b.what in sampled and not (options.quick and b.long)]
    if not chosen:
        why = "only rows that --quick leaves out contain" if named else "no row contains"
        parser.error(
            "\n  ".join([f"{why} {' or '.join(map(repr, options.only))}. Rows:", *(b.what for b in named or BENCHES)])
        )
    if any(isinstance(b, packed.Packed) for b in chosen) and not packed.PACKAGE.is_dir():
        parser.error(f"rows on NF4 need bitsandbytes in {packed.PACKAGE}: `make bench` puts it there")
    console = Console(width=None if Console().is_terminal else 170)
    rows: list[Row] = []
    failed: dict[str, str] = {}
    began = time.monotonic()
    with Progress(console=console, transient=True) as progress, suppress(KeyboardInterrupt):  # what there is, is shown
        task = progress.add_task("", total=len(chosen))
        for bench in chosen:
            progress.update(task, description=bench.what)
            torch.manual_seed(0)
            try:
                rows.append(bench.run(Effort(options.quick)))
            except Exception:  # the others take an hour
                failed[bench.what] = traceback.format_exc()
            progress.advance(task)
    versions = f"graft {graft.__version__}, PEFT {peft.__version__}, torch {torch.__version__}, one thread"
    console.print(tables.terminal(rows, f"CPU time, medians ± half the interquartile range. {versions}"))
    for what, error in failed.items():
        console.print(f"failed: {what}\n{error}", markup=False)
    faster = [row.faster for row in rows if row.faster is not None]
    ahead, behind = sum(r > 1.04 for r in faster), sum(r < 0.96 for r in faster)
    console.print(
        f"graft needs at least 4 % less than PEFT in {ahead} of {len(faster)} rows, at least 4 % more in {behind}",
        highlight=False,
    )
    if options.json:
        every = len(rows) == len(BENCHES) and not options.quick
        results.write(options.json, rows, versions, every, time.monotonic() - began)
    if options.plot:
        draw(rows, options.plot, versions)
    if len(chosen) < len(BENCHES) and not whole:
        console.print(f"{len(BENCHES) - len(chosen)} rows that moved in none of the last runs were left out: --all")
    if options.check:
        gone = guard.list_losses(rows)
        if gone:
            console.print("[red]Slower than in the last runs of this machine:[/]", *gone, sep="\n  ")
    if options.record:
        guard.record(rows, time.strftime("%Y-%m-%d"))
    if failed or (options.check and gone):
        sys.exit(1)


if __name__ == "__main__":
    main()
