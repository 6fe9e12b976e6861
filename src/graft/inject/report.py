# SPDX-License-Identifier: Apache-2.0
"""The report of an injection: modules matched, modules skipped and why, numbers that train. `plan` returns one."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from graft.core.errors import escape_controls
from graft.inject.match import format_hint

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


class Matched(NamedTuple):
    """A module that an adapter adapts or trains whole: path, type and number of trainable parameters."""

    name: str
    type: str
    parameters: int  # numbers that train
    shapes: tuple[str, ...] = ()


class Skipped(NamedTuple):
    """A module that a target names and another field takes out, with the reason."""

    name: str
    type: str
    why: str


@dataclass
class InjectReport:
    """The report of the injection of one adapter, done or planned.

    `skipped` lists modules that a target names and another field takes out; `untargeted` counts the rest by type.
    """

    adapter: str
    peft_type: str
    matched: list[Matched] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    untargeted: Counter[str] = field(default_factory=Counter)
    unmatched_targets: dict[str, list[tuple[str, int]]] = field(default_factory=dict)  # entry → similar names
    modules_to_save: list[Matched] = field(default_factory=list)
    other_trainable: int = 0  # numbers in biases of the base model, and in tensors that layers share
    base_parameters: int = 0

    @property
    def trainable_parameters(self) -> int:
        """The count of numbers that train: in layers, heads and token rows, biases, and tensors that layers share."""
        return sum(m.parameters for m in (*self.matched, *self.modules_to_save)) + self.other_trainable

    def table(self) -> Table:
        """Return the report as a rich Table with the columns module, type, n, trainable and the outcome.

        The title counts layers and trainable parameters, with their percentage.

        Paths that differ only in indices, with one type and outcome, are one row with their count and summed numbers:
        adapted modules, those trained whole, then skipped ones with the reason. Entries that match nothing, with
        similar names, and untargeted types (with the path "…") by falling count follow. A sum of 0 is an empty cell.
        """
        from rich.table import Table

        percent = 100 * self.trainable_parameters / max(1, self.trainable_parameters + self.base_parameters)
        title = (
            f"{self.peft_type} '{self.adapter}': {len(self.matched)} layer{'s' * (len(self.matched) != 1)}, "
            f"{self.trainable_parameters:,} trainable parameters ({percent:.2f} %)"
        )
        table = Table(title=format_cell(title), title_justify="left")
        for name in ("module", "type", "n", "trainable", ""):
            table.add_column(name, justify="right" if name in ("n", "trainable") else "left", overflow="fold")

        def add_row(*texts: str) -> None:
            """Add a row to the table, each text as `format_cell` returns it."""
            table.add_row(*map(format_cell, texts))

        groups: dict[tuple[str, str, str], list[int]] = {}
        for m in self.matched:
            groups.setdefault((star_indices(m.name), m.type, "adapted"), []).append(m.parameters)
        for m in self.modules_to_save:
            groups.setdefault((star_indices(m.name), m.type, "trained whole"), []).append(m.parameters)
        for s in self.skipped:
            groups.setdefault((star_indices(s.name), s.type, f"skipped: {s.why}"), []).append(0)
        for (name, kind, what), counts in groups.items():
            add_row(name, kind, str(len(counts)), f"{sum(counts):,}" if sum(counts) else "", what)
        for entry, similar in self.unmatched_targets.items():
            add_row(entry, "", "0", "", f"matched nothing{format_hint(similar)}")
        for kind, n in self.untargeted.most_common():
            add_row("…", kind, str(n), "", "not targeted")
        return table

    __rich__ = table

    def __str__(self) -> str:
        """Return the table as text, 110 columns wide."""
        from rich.console import Console

        out = io.StringIO()
        Console(file=out, width=110).print(self.table())
        return out.getvalue()


def format_cell(text: str) -> Text:
    """Return `text` as a rich Text. Control characters are escaped, and brackets are not read as markup."""
    from rich.text import Text

    return Text(escape_controls(text))


def star_indices(name: str) -> str:
    """Return a path with "*" for each number, so that equal modules of all blocks share a row."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
