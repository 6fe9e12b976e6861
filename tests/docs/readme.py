# SPDX-License-Identifier: Apache-2.0
"""The table at a glance and the bars of README, from the code and a run: `python -m tests.docs.readme`."""

from __future__ import annotations

from pathlib import Path

import peft

from benchmarks import results
from benchmarks.results import Run
from benchmarks.rows import BENCHES
from benchmarks.tables import line, ratio, show
from graft.files.formats import FORMATS, WRITTEN
from graft.files.serving import list_servers
from graft.files.verify import FAULTS
from graft.methods import ROWS
from tests.docs.marks import put
from tests.docs.tables import HEAD, row, single
from tests.peft_suite.results import kept, percent

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "README.md"
GLANCE = ROOT / "docs" / "performance.md"
BARS = ROOT / "docs" / "bars.svg"
SHOWN = {  # of the picture: a row of the benchmark → its name there
    "second adapter, 10k modules": "add a second adapter, 10,000 layers",
    "set_adapter, 50 loaded": "switch among 50 adapters",
    "load_adapter, 10th": "load a tenth adapter",
    "bytes kept, bf16 base + dropout": "memory kept for the backward pass",
    "slots 64 × 1, 64 adapters": "a batch with 64 adapters",
}
MEASURED = {  # what → row of the benchmark, and how `--only` names it
    "a second adapter, 10,000 layers": ("second adapter, 10k modules", "10k"),
    "loading a tenth adapter": ("load_adapter, 10th", "10th"),
    "a training step, LoRA, float32": ("training step, LoRA all linear, float32", "'LoRA all'"),
    "kept for backward, bf16, dropout": ("bytes kept, bf16 base + dropout", "'base + dropout'"),
    "a batch for 64 adapters": ("slots 64 × 1, 64 adapters", "slots"),
    "another adapter in place": ("hotswap_adapter (floor: read, check, copy)", "hotswap"),
}


def counted() -> list[list[str]]:
    """What the code says of itself."""
    rows = [dict(zip(HEAD, row(name), strict=True)) for name in single()]
    here = "`python -m tests.docs.readme`"
    return [
        ["methods", str(len(ROWS)), str(len(peft.PeftType)), here],
        *(
            [what, f"{sum(cells[column] == 'yes' for cells in rows)} of {len(rows)}", "–", here]
            for what, column in (
                ("layer methods that merge into weights", "merges"),
                ("layer methods that differ by row of a batch", "rows of a batch"),
            )
        ),
        ["formats of adapter files, read/written", f"{len(FORMATS)}/{len(WRITTEN)}", "1", here],
        ["servers whose reading of adapters `graft check` knows", str(len(list_servers())), "–", here],
        ["faults that `graft verify` tells apart on a running server", str(len(FAULTS)), "–", "`make test-serving`"],
        suite(),
    ]


def suite() -> list[str]:
    """PEFT's own tests, once a whole run of them is recorded; until then the packages that quantize."""
    run = kept()
    if run is None:
        packages = list((ROOT / "tests" / "packages").glob("*.txt"))
        return ["packages of quantized layers, tested", str(len(packages)), "–", "`make test-storages`"]
    passed = f"{percent(run.passed, run.counted)} of {run.counted:,}"
    return ["PEFT's own tests passed", passed, "–", "`make test-peft`"]


def measured(run: Run) -> list[list[str]]:
    lines = []
    for what, (name, only) in MEASURED.items():
        assert any(name == b.what and only.strip("'").lower() in name.lower() for b in BENCHES), name
        found = run.row(name)
        graft, theirs = (show(found.median(who), 0, found.unit) for who in ("graft", "PEFT"))
        lines.append([what, graft, f"{theirs} ({ratio(found.faster)} ×)", f'`make bench BENCH="--only {only}"`'])
    return lines


def table() -> str:
    run = results.read()
    head = ["", "graft", "PEFT 0.21.2", "command"]
    return "\n".join(line(cells) for cells in [head, ["---"] * len(head), *counted(), *measured(run)])


def bars() -> str:
    """Return the picture: for each row PEFT's bar at full length, and graft's by its share."""
    run, lines = results.read(), []
    for i, (name, title) in enumerate(SHOWN.items()):
        row, y = run.row(name), 64 * i
        graft, theirs = (row.median(who) for who in ("graft", "PEFT"))
        lines.append(f'<text x="0" y="{y + 14}" class="title">{title}</text>')
        for k, (who, value) in enumerate((("PEFT", theirs), ("graft", graft))):
            width, top = max(2, round(460 * value / theirs)), y + 20 + 19 * k
            lines.append(f'<rect x="0" y="{top}" width="{width}" height="15" class="{who}"/>')
            lines.append(f'<text x="{width + 6}" y="{top + 12}">{who} {show(value, 0, row.unit)}</text>')
    style = "text{font:12px sans-serif;fill:#777}.title{font-weight:bold}.PEFT{fill:#9aa0a6}.graft{fill:#009688}"
    size = f'viewBox="0 0 620 {64 * len(SHOWN)}" width="620"'
    body = "\n".join(lines)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<style>{style}</style>\n{body}\n</svg>\n'


def pages() -> dict[Path, str]:
    """Return the page with the table of now, and the picture, by their paths."""
    return {GLANCE: put(GLANCE.read_text(), "why", table()), BARS: bars()}


def main() -> None:
    for page, text in pages().items():
        page.write_text(text)


if __name__ == "__main__":
    main()
    print(table())
