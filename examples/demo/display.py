# SPDX-License-Identifier: Apache-2.0
"""What the demo shows on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from examples.demo.data import Task

console = Console() if Console().is_terminal else Console(width=120)


def progress(losses: Iterable[float], name: str, steps: int) -> list[float]:
    """Collect the losses of a training run behind a bar that shows the latest."""
    loss_column = TextColumn("loss {task.fields[loss]:.3f}")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), loss_column, TimeElapsedColumn()
    collected = []
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(f"training {name}", total=steps, loss=float("nan"))
        for loss in losses:
            collected.append(loss)
            bar.update(task, advance=1, loss=loss)
    return collected


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
