# SPDX-License-Identifier: Apache-2.0
"""The table of learning rates in docs/reference/measurements.md, from the package and the sources of methods."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from graft.core.method import COMPARISON, PublishedRate
from graft.methods import ROWS, method_of
from graft.methods.lora.lora import VARIANTS, import_beside
from graft.model.rates import RateSearch, best_lr, good_range, read_searches

TASKS = ("topics", "spam", "dates")
HEAD = ("method", *TASKS, "size", "its source")
SHORT = {COMPARISON: "PEFT's comparison"}


def table() -> str:
    lines = [HEAD, ["---"] * len(HEAD), *cells()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells() -> Iterator[list[str]]:
    classes = {c.__name__: c for name in ROWS for c in kinds(name)}
    found = sorted(read_searches(), key=lambda row: (row["method"].lower(), size(row)))
    for (method, sizes), group in groupby(found, lambda row: (row["method"], size(row))):
        by_task = {row["task"]: row for row in group}
        adapter = next(iter(by_task.values()))["adapter"]
        scores = [rate(by_task[task]) if task in by_task else "" for task in TASKS]
        yield [method, *scores, sizes, source(classes[adapter].published_lr)]
    shown = {row["adapter"] for row in found}
    for name, cls in sorted(classes.items(), key=lambda item: item[0].lower()):
        if name not in shown and "published_lr" in vars(cls):
            yield [name, *[""] * len(TASKS), "", source(cls.published_lr)]


def rate(row: RateSearch) -> str:
    """Return the best rate, and those that are as good."""
    low, high = good_range([row])
    return f"{best_lr([row]):g}" if low == high else f"{best_lr([row]):g} ({low:g} to {high:g})"


def kinds(name: str) -> list[type]:
    """Return the class of a method, and of its variants."""
    return [method_of(name), *(map(import_beside, VARIANTS.values()) if name == "LORA" else ())]


def size(row: RateSearch) -> str:
    return ", ".join(f"{k} {v}" for k, v in row["config"].items()) or "defaults"


def source(published: PublishedRate | None) -> str:
    if published is None:
        return ""
    low, high, where = published
    for long, short in SHORT.items():
        where = where.replace(long, short)
    return f"{low:g} ({where})" if low == high else f"{low:g} to {high:g} ({where})"
