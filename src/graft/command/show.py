# SPDX-License-Identifier: Apache-2.0
"""Output of the verbs for people: lines, tables, and numbers as text."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence

from graft.core.errors import escape_controls

THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")  # of numpy's linear algebra
UNITS = ((10**9, "G"), (10**6, "M"), (10**3, "k"))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table, unless it has no rows; the first column is text, the others are numbers.

    By hand: importing rich would take a fifth of the time of `graft inspect`.
    """
    cells = [[format_value(value) for value in row] for row in rows]
    if not cells:
        return
    widths = [max(map(len, column)) for column in zip(columns, *cells)]

    def line(row: Sequence[str]) -> str:
        padded = [value.rjust(width) if i else value.ljust(width) for i, (value, width) in enumerate(zip(row, widths))]
        return " " + "   ".join(padded)

    head = [title] if title else []
    rule = " " + "─" * (len(line(columns)) - 1)
    for printed in (*head, "", line(columns), rule, *map(line, cells), ""):
        print_line(printed)


def print_facts(pairs: Iterable[tuple[str, object]]) -> None:
    """Print facts, a line for each that is one."""
    for name, value in pairs:
        if value not in (None, "", [], {}):
            print_line(f"{name:<12} {format_value(value)}")


def print_line(line: str) -> None:
    """Print one line on standard output, whatever characters the names in it have."""
    print(escape_controls(line))


def format_value(value: object) -> str:
    """Return a value as a table shows it, without control characters."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(format_value, value))
    return escape_controls(str(value))


def split_commas(words: str) -> list[str]:
    """Return what an option lists by commas."""
    return [word for part in words.split(",") if (word := part.strip())]


def format_amount(n: int) -> str:
    """Return a number as people write it: 1.3M."""
    return next((f"{n / size:.3g}{unit}" for size, unit in UNITS if n >= size), str(n))


def format_ranks(ranks: Sequence[int]) -> str:
    return "–" if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}"


def limit_numpy_threads() -> None:
    """Have numpy, if it is not there yet, start no threads: for small factors that takes longer than they save."""
    if "numpy" not in sys.modules and not any(name in os.environ for name in THREADS):
        os.environ[THREADS[0]] = "1"


def print_progress(line: str, quiet: bool = False) -> None:
    """Print how far a verb is, on standard error, for who sits before it."""
    if not quiet and sys.stderr.isatty():
        print(escape_controls(line), file=sys.stderr)
