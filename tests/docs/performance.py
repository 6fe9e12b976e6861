# SPDX-License-Identifier: Apache-2.0
"""The numbers of docs/performance.md, printed from a run of the benchmark.

`python -m tests.docs.performance [FILE]` takes what `make bench BENCH="--json FILE"` wrote as the run to show, and
writes page, picture and README's table anew.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from benchmarks import guard, results, tables
from benchmarks.plots import draw
from benchmarks.results import Run
from benchmarks.rows import BENCHES
from benchmarks.tables import ratio, show
from tests.docs.marks import put

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
PICTURE = PAGE.with_name("bench.png")
EXPECT = {  # what to expect → rows that say so
    "Importing it, of which torch and safetensors are the most": ["import (floor: torch and safetensors)"],
    "The first adapter on 560 linear layers": ["inject, 560 linears"],
    "A second adapter on 10,000 of them": ["second adapter, 10k modules"],
    "Loading the tenth adapter from a file": ["load_adapter, 10th"],
    "Switching among 50 adapters": ["set_adapter, 50 loaded"],
    "Merging": ["merge_adapter (floor: addmm_)"],
    "A training step with LoRA, in float32, where the base's own products are nearly all of it": [
        "training step, LoRA all linear, float32"
    ],
    "The same with a bf16 base and dropout, and what autograd keeps for it": [
        "training step, bf16 base + dropout",
        "bytes kept, bf16 base + dropout",
    ],
    "A training step with DoRA and dropout": ["training step, DoRA + dropout", "bytes kept, DoRA + dropout"],
    "Decoding one token, and a batch of 64 tokens with 64 adapters in slots": ["decode", "slots 64 × 1, 64 adapters"],
}
PARTS = (
    "training step, ",
    "forward, ",
    "step, ",
    "bytes kept, ",
    "peak memory, ",
)  # of a row's name, before its subject


def expect(run: Run) -> str:
    lines = []
    for what, names in EXPECT.items():
        figures = []
        for row in map(run.row, names):
            graft, peft = (show(row.median(who), 0, row.unit) for who in ("graft", "PEFT"))
            figures.append(f"{graft} against {peft} ({ratio(row.faster)} ×)")
        lines.append(f"- {what}: {'; '.join(figures)}.")
    return "\n".join(lines)


def table(run: Run) -> str:
    met = sum(row.met is True for row in run.rows)
    head = f"The run: {run.run}. {run.versions}. It met {met} of {len(run.rows)} goals."
    return "\n\n".join([head, tables.markdown(run, guard.met_once()), absent(run)])


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


def page() -> str:
    run, text = results.read(), PAGE.read_text()
    for mark, printed in (("expect", expect(run)), ("behind", behind(run)), ("table", table(run))):
        text = put(text, mark, printed)
    return text


def main(*files: str) -> None:
    from tests.docs import readme

    for file in files:
        if not results.read(Path(file)).whole:
            sys.exit(f"{file} has not all rows: run the benchmark without --only and --quick, to its end")
        shutil.copyfile(file, results.RESULTS)
    run = results.read()
    PAGE.write_text(page())
    draw(run.rows, str(PICTURE), run.versions, results.digest())
    readme.PAGE.write_text(readme.page())


if __name__ == "__main__":
    main(*sys.argv[1:])
