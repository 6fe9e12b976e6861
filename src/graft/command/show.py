# SPDX-License-Identifier: Apache-2.0
"""Output of the verbs for people: lines, tables, and values as text."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence

from graft.core.errors import escape_controls

THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")  # read by numpy's linear algebra
UNITS = ((10**9, "G"), (10**6, "M"), (10**3, "k"))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table with the title, an empty line, the column names, a rule, the rows and an empty line.

    Without a title that line is left out; without rows nothing is printed.

    Cells are texts of `format_value`. Each column is as wide as its longest text, the first aligned left, others right.
    """
    cells = [[format_value(value) for value in row] for row in rows]
    if not cells:
        return
    widths = [max(map(len, column)) for column in zip(columns, *cells)]

    def line(row: Sequence[str]) -> str:
        """Return the cells of a row: a space, the first cell aligned left and the others right, three spaces between
        them.
        """
        padded = [value.rjust(width) if i else value.ljust(width) for i, (value, width) in enumerate(zip(row, widths))]
        return " " + "   ".join(padded)

    head = [title] if title else []
    rule = " " + "─" * (len(line(columns)) - 1)
    for printed in (*head, "", line(columns), rule, *map(line, cells), ""):
        print_line(printed)


def print_facts(pairs: Iterable[tuple[str, object]]) -> None:
    """Print "name value" for each pair, one per line, the name padded to 12 characters and the value by `format_value`;
    pairs with None, "", [] or {} are skipped.
    """
    for name, value in pairs:
        if value not in (None, "", [], {}):
            print_line(f"{name:<12} {format_value(value)}")


def print_line(line: str) -> None:
    """Print one line on standard output, with control characters escaped."""
    print(escape_controls(line))


def print_lines(text: str) -> None:
    """Print each line of a text on standard output, with other control characters escaped."""
    for line in text.splitlines():
        print_line(line)


def format_value(value: object) -> str:
    """Return a value as a text: "–" for None, "yes" or "no" for bools, floats with four significant digits.

    Items of lists and tuples are formatted likewise and joined by ", ". All else is its `str`, with control characters
    escaped.
    """
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
    """Return the non-empty words of a text with commas, stripped."""
    return [word for part in words.split(",") if (word := part.strip())]


def format_amount(n: int) -> str:
    """Return a number with three significant digits and k, M or G: 1.3M; below 1000 as it is."""
    return next((f"{n / size:.3g}{unit}" for size, unit in UNITS if n >= size), str(n))


def format_ranks(ranks: Sequence[int]) -> str:
    """Return sorted ranks as a text: "–", "8", or "4–16" for the first and last of several."""
    return "–" if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}"


def limit_numpy_threads() -> None:
    """Set OPENBLAS_NUM_THREADS to "1", so that numpy's linear algebra uses one thread, which is faster for small
    factors.

    Does nothing if numpy is imported already, or the user has set this variable, MKL_NUM_THREADS or OMP_NUM_THREADS.
    """
    if "numpy" not in sys.modules and not any(name in os.environ for name in THREADS):
        os.environ[THREADS[0]] = "1"


def print_progress(line: str, quiet: bool = False) -> None:
    """Print a line on standard error, with control characters escaped, if it is a terminal and `quiet` is False."""
    if not quiet and sys.stderr.isatty():
        print(escape_controls(line), file=sys.stderr)
