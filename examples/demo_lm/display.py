# SPDX-License-Identifier: Apache-2.0
"""The tables that this demo shows on the terminal."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from examples.demo.display import cut
from examples.demo_lm.data import Pair, Task


def tasks_table(tasks: Sequence[Task]) -> Table:
    table = Table("task", "instruction", "to train", "test", "seen in both", "for example")
    for task in tasks:
        sizes = str(len(task.train)), str(len(task.test)), str(task.leaks)
        pair = task.train[0]
        table.add_row(task.name, task.instruction, *sizes, f"{cut(pair.text, 40)} → {pair.answer}")
    return table


def scores_table(results: dict[str, Any]) -> Table:
    """Exact and lenient scores of every row of `results[task]["scores"]`."""
    sizes = ", ".join(f"{name} {result['test']}" for name, result in results.items())
    table = Table(title=f"greedy answers to the test set ({sizes}) ± standard error", title_justify="left")
    table.add_column()
    for name in results:
        for kind in ("exact", "lenient"):
            table.add_column(f"{name}, {kind}", justify="right")
    rows = dict.fromkeys(row for result in results.values() for row in result["scores"])
    for row in rows:
        cells = []
        for result in results.values():
            for kind in ("exact", "lenient"):
                score = result["scores"].get(row, {}).get(kind)
                cells.append("" if score is None else with_error(score, result["test"]))
        table.add_row(row, *cells, style="bold" if row == "adapter" else None)
    return table


def with_error(p: float, n: int) -> str:
    return f"{p:.2f} ± {(p * (1 - p) / n) ** 0.5:.2f}"


def groups_table(task: str, groups: dict[str, dict[str, float]]) -> Table:
    names = next(iter(groups.values()))
    table = Table(f"{task}, exact", *names)
    for who, scores in groups.items():
        table.add_row(who, *(f"{scores[name]:.2f}" for name in names))
    return table


def before_after_table(pairs: Sequence[Pair], before: Sequence[str], after: Sequence[str]) -> Table:
    table = Table("text", "truth", "base", "adapter")
    for pair, old, new in zip(pairs, before, after, strict=True):
        table.add_row(cut(pair.text, 40), pair.answer, shown(old, pair), shown(new, pair))
    return table


def mixed_table(rows: Sequence[tuple[str, Pair]], answers: Sequence[str]) -> Table:
    """One line per row of a batch: the adapter, the pair, and what the model said."""
    table = Table("adapter", "text", "truth", "answer")
    for (adapter, pair), answer in zip(rows, answers, strict=True):
        table.add_row(adapter, cut(pair.text, 40), pair.answer, shown(answer, pair))
    return table


def shown(answer: str, pair: Pair) -> str:
    color = "green" if answer.strip() == pair.answer else "red"
    text = cut(" ".join(answer.split()), 40).replace("[", r"\[")
    return f"[{color}]{text}[/]"


def comparison_table(methods: dict[str, Any], test: int, caption: str) -> Table:
    table = Table(title="dates, by method", title_justify="left", caption=caption, caption_justify="left")
    table.add_column("method")
    for name in ("what", "rate", "trainable", "file", "exact", "lenient", "seconds"):
        table.add_column(name, justify="left" if name == "what" else "right", no_wrap=name != "what")
    for name, m in methods.items():
        table.add_row(
            name,
            m["note"],
            f"{m['lr']:g}",
            f"{m['parameters']:,}",
            f"{m['bytes'] / 1000:,.0f} kB",
            with_error(m["exact"], test),
            with_error(m["lenient"], test),
            f"{m['seconds']:.0f}",
        )
    return table
