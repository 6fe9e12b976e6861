# SPDX-License-Identifier: Apache-2.0
"""The rows of a run as a table: for the terminal, and for a page."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from benchmarks.measure import Row
from benchmarks.results import Found, Run

COLUMNS = ("graft", "PEFT", "floor")
RATIOS = ("PEFT / graft", "graft / floor")


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


def terminal(rows: list[Row], title: str) -> Table:
    made = Table(title=title, title_justify="left")
    for name in ("what", *COLUMNS, *RATIOS, "goal", "met"):
        made.add_column(name, justify="left" if name in ("what", "goal", "met") else "right", no_wrap=name == "what")
    for row in rows:
        cells = [show(row.median(who), row.spread(who) if who in row.values else 0, row.unit) for who in COLUMNS]
        met = {True: "[green]yes[/]", False: "[red]no[/]", None: "–"}[row.goal.met(row)]
        made.add_row(row.what, *cells, ratio(row.faster), ratio(row.over_floor), str(row.goal), met)
    return made


def markdown(run: Run, once: Iterable[str]) -> str:
    """`once`: the rows whose goal was met in an earlier run."""
    head = ["what", *COLUMNS, *RATIOS, "goal", "met"]
    return "\n".join(line(cells) for cells in [head, ["---"] * len(head), *(cells(row, set(once)) for row in run.rows)])


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def cells(row: Found, once: set[str]) -> list[str]:
    lost = "**no**, once yes" if row.what in once else "**no**"
    return [
        row.what,
        *(show(row.median(who), 0, row.unit) for who in COLUMNS),
        ratio(row.faster),
        ratio(row.over_floor),
        row.goal,
        {True: "yes", False: lost, None: "–"}[row.met],
    ]
