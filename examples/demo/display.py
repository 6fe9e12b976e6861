# SPDX-License-Identifier: Apache-2.0
"""What the demo shows on the terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from examples.demo.data import Task

console = Console() if Console().is_terminal else Console(width=120)
BETWEEN = 10.0  # seconds between two lines about one run, where no terminal shows a bar


class Steps:
    """The progress of a run: a bar on a terminal, elsewhere a plain line now and then. Use it as a context manager.

    Args:
        name: what runs.
        total: its number of steps.
        what: what it does at first.
    """

    def __init__(self, name: str, total: int, what: str = "", clock: Callable[[], float] = time.monotonic):
        self.name, self.total, self.what, self.done = name, total, what, 0
        self._clock, self._started, self._said = clock, clock(), -math.inf
        self._new = True  # whether something is not yet said
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[what]}")
        self._bar = Progress(*columns, TimeElapsedColumn(), console=console) if console.is_terminal else None

    def __enter__(self) -> Steps:
        if self._bar:
            self._bar.start()
            self._bar.add_task(self.name, total=self.total, what=self.what)
        self.update()
        return self

    def update(self, done: int | None = None, what: str | None = None) -> None:
        """Tell that so many steps are done, or what is being done; None leaves either as it was."""
        self.done = self.done if done is None else done
        self.what = self.what if what is None else what
        self._new = True
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=self.done, what=self.what)
        elif self._clock() - self._said >= BETWEEN:
            self._say()

    def _say(self) -> None:
        self._said, self._new = self._clock(), False
        seconds = f"{self._said - self._started:.0f} s"
        parts = filter(None, (self.what, seconds))
        console.print(f"{self.name}: {self.done}/{self.total}, {', '.join(parts)}", markup=False, highlight=False)

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()
        elif self._new:
            self._say()


def progress(losses: Iterable[float], name: str, steps: int) -> list[float]:
    """Collect the losses of a training run, and show how far it is and the latest."""
    collected = []
    with Steps(f"training {name}", steps) as shown:
        for loss in losses:
            collected.append(loss)
            shown.update(len(collected), f"loss {loss:.3f}")
    return collected


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say what the program is at within the block: a moving sign on a terminal, elsewhere a line."""
    if console.is_terminal:
        with console.status(what):
            yield
    else:
        console.print(f"{what} …", markup=False, highlight=False)
        yield


def tasks_table(tasks: Sequence[Task]) -> Table:
    table = Table("task", "labels", "to train", "held out", "for example")
    for task in tasks:
        sizes = str(len(task.train)), str(len(task.test))
        table.add_row(task.name, ", ".join(task.labels), *sizes, cut(task.train.texts[0]))
    return table


def accuracy_table(results: dict[str, Any]) -> Table:
    table = Table(title="held-out accuracy ± standard error", title_justify="left")
    table.add_column()
    for name in results:
        table.add_column(name, justify="right")
    for row in next(iter(results.values()))["accuracy"]:
        cells = []
        for result in results.values():
            p = result["accuracy"][row]
            cells.append(f"{p:.3f} ± {(p * (1 - p) / result['test']) ** 0.5:.3f}")
        table.add_row(row, *cells, style="bold" if row == "adapter, trained" else None)
    return table


def answers_table(rows: Sequence[tuple[Task, int]], answers: Tensor) -> Table:
    """One line per row of a batch; `rows` are tasks and the numbers of their held-out texts."""
    table = Table("adapter", "text", "answer", "truth")
    for (task, i), answer in zip(rows, answers.tolist(), strict=True):
        truth = task.labels[int(task.test.labels[i])]
        table.add_row(task.name, cut(task.test.texts[i]), task.labels[answer], truth)
    return table


def cut(text: str, width: int = 60) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
