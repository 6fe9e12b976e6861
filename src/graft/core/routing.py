# SPDX-License-Identifier: Apache-2.0
"""Which adapter each row of the current batch uses: written once per call, read by every layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from graft.core.errors import RoutingError

BASE = "__base__"  # the row uses no adapter


@dataclass
class Rows:
    """A batch grouped by adapter."""

    batch: int
    segments: tuple[tuple[str | None, Tensor], ...]  # (adapter or None for the base model, row indices)

    @classmethod
    def of(cls, names: Sequence[str], device: torch.device | None = None) -> Rows:
        groups: dict[str | None, list[int]] = {}
        for row, name in enumerate(names):
            groups.setdefault(None if name == BASE else name, []).append(row)
        return cls(len(names), tuple((name, torch.tensor(rows, device=device)) for name, rows in groups.items()))

    @cached_property
    def inverse(self) -> Tensor:
        """Puts the concatenated segments back into the order of the batch."""
        return torch.argsort(torch.cat([index for _, index in self.segments]))

    @cached_property
    def grouped(self) -> tuple[list[str], Tensor, list[int], bool] | None:
        """The adapters, their rows, adapter by adapter, how many each has, and whether this is the batch as it stands;
        if there are several adapters."""
        own = [(name, index) for name, index in self.segments if name is not None]
        if len(own) < 2:
            return None
        order = torch.cat([index for _, index in own])
        in_order = len(order) == self.batch and order.tolist() == list(range(self.batch))
        return [name for name, _ in own], order, [len(index) for _, index in own], in_order

    def take(self, x: Tensor, layer: str, ids: bool = False) -> Tensor:
        """`x` with one row per sample. Ids that all samples share, such as positions, are repeated."""
        if x.shape[0] == self.batch:
            return x
        if x.shape[0] == 1 and ids:
            return x.expand(self.batch, *x.shape[1:])
        raise RoutingError(
            f"layer '{layer}' received {x.shape[0]} rows in a mixed batch of {self.batch} samples: its input is not "
            "one row per sample, so rows cannot be given to adapters here. Run one adapter at a time, or exclude "
            "this layer with exclude_modules."
        )


class Routing:
    """The routing of the current call. One object per model, shared by all its adapter layers."""

    def __init__(self) -> None:
        self.rows: Rows | None = None
        self._task: tuple[int, Rows | None] | None = None  # the backward pass that `rows` was last put back for
        self._ambiguous = False

    @contextmanager
    def using(self, rows: Rows | None) -> Iterator[None]:
        self._drop_stale()
        before, self.rows = self.rows, rows
        try:
            yield
        finally:
            self.rows = before

    def keep_for_backward(self, output: Any, rows: Rows | None) -> None:
        """Gradient checkpointing runs layers again in the backward pass: have `rows` stand there again."""
        for t in _tensors(output):
            if t.requires_grad:
                t.register_hook(lambda _grad: self._restore(rows))

    def _restore(self, rows: Rows | None) -> None:
        task = torch._C._current_graph_task_id()
        if self._task is None or self._task[0] != task:
            self._task, self.rows = (task, rows), rows
            torch.autograd.Variable._execution_engine.queue_callback(self._end)  # type: ignore[attr-defined]
        elif self._task[1] is not rows:
            self._ambiguous = True
            self.rows = self.rows or rows  # so that layers ask, and are told

    def _end(self) -> None:
        self._task = self.rows = None
        self._ambiguous = False

    def _drop_stale(self) -> None:
        """A backward pass that failed never came to its end, and left its rows."""
        if self._task is not None and torch._C._current_graph_task_id() == -1:
            self._end()

    def current(self) -> Rows | None:
        self._drop_stale()
        if self._ambiguous:
            raise RoutingError(
                "one backward pass covers two mixed-batch forward passes under gradient checkpointing, so the rows "
                "of a recomputed layer are ambiguous. Call backward() after each forward, or turn checkpointing off."
            )
        return self.rows


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)
