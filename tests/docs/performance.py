# SPDX-License-Identifier: Apache-2.0
"""The numbers of docs/performance.md and docs/performance_rows.md, printed from a run of the benchmark.

`python -m tests.docs.performance [FILE]` takes what `make bench BENCH="--json FILE"` wrote as the run to show, and
writes the pages and README's bars anew.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from statistics import median

from benchmarks import guard, results, tables
from benchmarks.results import Run
from benchmarks.rows import BENCHES
from benchmarks.tables import ratio, show
from tests.docs.marks import put

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
ROWS = PAGE.with_name("performance_rows.md")
EXPECT = (  # the rows that a reader looks for first
    "import (floor: torch and safetensors)",
    "inject, 560 linears",
    "second adapter, 1k modules",
    "second adapter, 10k modules",
    "load_adapter, 10th",
    "save_pretrained (floor: save_file)",
    "set_adapter, 50 loaded",
    "merge_adapter (floor: addmm_)",
    "merge_and_unload",
    "weighted svd, 3 adapters",
    "training step, LoRA all linear, float32",
    "training step, bf16 base + dropout",
    "bytes kept, bf16 base + dropout",
    "peak memory, LoRA step, 30 layers, bf16",
    "training step, DoRA + dropout",
    "bytes kept, DoRA + dropout",
    "step, OFT block 32",
    "step, VeRA r 256",
    "step, SHiRA r 8, bf16 base",
    "step, LoRA r 16 on NF4",
    "decode",
    "decode, LoRA on 32 experts (floor: the base)",
    "mixed batch 64 × 1, 64 adapters",
    "slots 64 × 1, 64 adapters",
    "hotswap_adapter (floor: load_file and copy)",
)
NOISE = 0.04  # of a ratio
# of a row's name, before its subject
PARTS = ("training step, ", "forward, ", "step, ", "bytes kept, ", "peak memory, ")


def summary(run: Run) -> str:
    """In how many rows graft is ahead of PEFT, as far as the run tells."""
    rows = [(r.faster, r.what) for r in run.rows if r.faster is not None]
    ahead = [x for x, _ in rows if x > 1 + NOISE]
    behind = sorted((x, what) for x, what in rows if x < 1 - NOISE)
    named = "; ".join(f"{what} ({ratio(x)} ×)" for x, what in behind)
    lines = [
        f"- graft is ahead in {len(ahead)} of {len(rows)} rows, in half of these by {ratio(median(ahead))} × or more.",
        f"- {len(rows) - len(ahead) - len(behind)} rows are equal within {100 * NOISE:.0f} %, which is noise here.",
        f"- PEFT is ahead in {f'{len(behind)}: {named}' if behind else 'none'}.",
        f"- The run: {run.run}. {run.versions}.",
    ]
    return "\n".join(lines)


def expect(run: Run) -> str:
    head = ["what", "graft", "PEFT", "PEFT / graft"]
    lines = [head, ["---"] * len(head)]
    for row in map(run.row, EXPECT):
        lines.append([row.what, *(show(row.median(who), 0, row.unit) for who in head[1:3]), ratio(row.faster)])
    return "\n".join(map(tables.line, lines))


def table(run: Run) -> str:
    met = sum(row.met is True for row in run.rows)
    head = f"The run: {run.run}. {run.versions}. It met {met} of {len(run.rows)} goals."
    once = guard.list_goals_met_once({bench.what: bench.goal for bench in BENCHES})
    return "\n\n".join([head, tables.markdown(run, once), absent(run)])


def absent(run: Run) -> str:
    """What the benchmark measures and this run has not."""
    had = {row.what for row in run.rows}
    rows = [bench.what for bench in BENCHES if bench.what not in had]
    if not rows:
        return "The run has all rows of the benchmark."
    subjects = dict.fromkeys(subject(name) for name in rows)
    return f"The run lacks {len(rows)} rows, which the benchmark has got since: {'; '.join(subjects)}."


def subject(name: str) -> str:
    for part in PARTS:
        name = name.removeprefix(part)
    return name.removesuffix(", bf16 base")


def behind(run: Run) -> str:
    """The rows in which PEFT is the faster or smaller one, as far as two digits tell."""
    rows = [r for r in run.rows if r.faster is not None and round(r.faster, 2) < 1]
    if not rows:
        return "PEFT is ahead in no row."
    named = "; ".join(f"{r.what} ({ratio(r.faster)} ×)" for r in rows)
    return f"PEFT is ahead in {len(rows)} of {len(run.rows)} rows: {named}."


def pages() -> dict[Path, str]:
    """The pages as the run has them, by their paths."""
    run = results.read()
    parts = {PAGE: (("summary", summary), ("expect", expect)), ROWS: (("behind", behind), ("table", table))}
    written = {}
    for path, printed in parts.items():
        written[path] = path.read_text()
        for mark, said in printed:
            written[path] = put(written[path], mark, said(run))
    return written


def main(*files: str) -> None:
    from tests.docs import readme

    for file in files:
        if not results.read(Path(file)).whole:
            sys.exit(f"{file} has not all rows: run the benchmark without --only and --quick, to its end")
        shutil.copyfile(file, results.RESULTS)
    for page, text in pages().items():
        page.write_text(text)
    readme.main()


if __name__ == "__main__":
    main(*sys.argv[1:])
