# SPDX-License-Identifier: Apache-2.0
"""The table of runs: live on a terminal, elsewhere printed every 30 seconds and at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from graft.core.errors import escape_controls
from graft.many.run import Run

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

COLUMNS = ("run", "step", "loss", "validation", "lr", "gradient", "tokens/s", "state")
LIVE, PRINTED = 0.25, 30.0  # seconds between two looks


def make_table(columns: Iterable[str], rows: Iterable[tuple[list[str], str | None]]) -> Table:
    """Return a table of rich with these rows: the texts of the cells and the style of each.

    Control characters are escaped, and brackets are not read as markup.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns)
    for cells, style in rows:
        table.add_row(*(Text(escape_controls(cell)) for cell in cells), style=style)
    return table


def make_run_table(runs: Iterable[Run]) -> Table:
    """Return a table of runs as they are now, a row each, with the columns `COLUMNS`, all but the first and last
    right-aligned. Failed runs are red, and those that do not run are dim.
    """
    styles = {"failed": "red", "running": None}
    table = make_table(COLUMNS, ((list_cells(run), styles.get(run.state, "dim")) for run in runs))
    for column in table.columns[1:-1]:
        column.justify = "right"
    return table


def list_cells(run: Run) -> list[str]:
    """Return the texts of a run's row: name, step ("3", or "3/10" with `steps`), last loss, last validation loss, rate,
    norm of the last gradient, tokens per second, state.

    Losses have 4 decimals. Loss, validation loss or norm that is missing is "".
    """
    last = run.curve[-1] if run.curve else None
    return [
        run.name,
        f"{run.step}" if run.steps is None else f"{run.step}/{run.steps}",
        "" if last is None else f"{last.loss:.4f}",
        f"{run.valid[-1].loss:.4f}" if run.valid else "",
        f"{run.lr:.2g}",
        "" if last is None else f"{last.norm:.3g}",
        f"{run.tokens_per_second:,.0f}",
        run.state,
    ]


class Progress:
    """Shows the table of runs within the block, and once more at its end.

    Args:
        runs: returns the runs to show.
        console: of rich; None: standard output.
        clock: returns seconds.
    """

    def __init__(
        self,
        runs: Callable[[], Iterable[Run]],
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Note the clock's time as the last time shown. Makes a live display if the console is a terminal."""
        from rich.console import Console
        from rich.live import Live

        self.runs, self.clock = runs, clock
        self.console = console or Console()
        self._live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self._shown = clock()

    def __enter__(self) -> Progress:
        """Start the live display on a terminal; elsewhere nothing happens. Return self."""
        if self._live is not None:
            self._live.start()
        return self

    def update(self) -> None:
        """Show the runs, if 0.25 s have passed since they were shown on a terminal, or 30 s elsewhere."""
        if self.clock() - self._shown >= (PRINTED if self._live is None else LIVE):
            self.show()

    def show(self) -> None:
        """Show the runs now: refresh the live display, or without one print a new table.

        The time of the clock is kept in `_shown` first.
        """
        self._shown = self.clock()
        if self._live is None:
            self.console.print(make_run_table(self.runs()))
        else:
            self._live.update(make_run_table(self.runs()), refresh=True)

    def __exit__(self, *_: object) -> None:
        """Show the runs once more, also after an error, and stop the live display, if there is one."""
        self.show()
        if self._live is not None:
            self._live.stop()
