# SPDX-License-Identifier: Apache-2.0
"""Which adapter each row of the current batch uses: written once per call, read by every layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from threading import get_ident
from types import NoneType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graft.core.errors import RoutingError

BASE = "__base__"  # the row uses no adapter
LIMIT = 100_000  # objects of an output that are looked at


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
    def names(self) -> tuple[str | None, ...]:
        """The adapters in the batch, None for the base model."""
        return tuple(name for name, _ in self.segments)

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


def copies_of(model: Any, kwargs: Mapping[str, Any]) -> int:
    """How often the `generate` of a model repeats each row: for beams, or for several samples."""
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    settings = ("num_beams", "num_return_sequences")
    return max(kwargs.get(s) or getattr(config, s, None) or 1 for s in settings)


class Gates(Protocol):
    """How much each adapter counts in a call, for mixtures of adapters."""

    def apply(self, layer: Any, adapter: str, part: Tensor) -> Tensor:
        """What `adapter` adds to the output of `layer`, weighed."""
        ...

    def rows(self, index: Tensor) -> Gates:
        """The gates of some rows of the batch."""
        ...


class Call:
    """The rows of the current call. One object per model, shared by all its adapter layers."""

    def __init__(self) -> None:
        self.rows: Rows | None = None
        self.gates: Gates | None = None
        self.state: dict[str, Any] = {}  # what layers hand on to those that run later
        self.arguments: dict[str, Any] = {}  # of the model
        self._calls: dict[int, Rows | None] = {}  # of the calls under way, by thread
        self._task: tuple[int, Rows | None] | None = None  # the backward pass that `rows` was last put back for
        self._ambiguous = False
        self._untold: Rows | None = None  # of the last call, if nothing will put them back for its backward pass

    @contextmanager
    def using(self, rows: Rows | None) -> Iterator[None]:
        """Have `rows` stand here within the block.

        Raises:
            RoutingError: other threads run the model as well, and this batch or theirs is mixed.
        """
        self._drop_stale()
        if self._untold is not None:
            self._untold = self.rows = None
        with self._alone(rows):
            before, self.rows = self.rows, rows
            try:
                yield
            finally:
                self.rows = before

    @contextmanager
    def _alone(self, rows: Rows | None) -> Iterator[None]:
        calls, thread = self._calls, 0 if torch.compiler.is_compiling() else get_ident()
        nested, outer = thread in calls, calls.get(thread)
        calls[thread] = rows  # before the others are looked at, so that of two threads one at least sees the other
        try:
            if len(calls) > 1 and any(r is not None for r in list(calls.values())):
                raise RoutingError(
                    "two threads run this model at once, and at least one of the batches is mixed (adapter_names), so "
                    "that its rows would be taken for those of the other. Run mixed batches one after another."
                )
            yield
        finally:
            if nested:
                calls[thread] = outer
            else:
                del calls[thread]

    def keep_for_backward(self, output: Any, rows: Rows | None) -> None:
        """Gradient checkpointing runs layers again in the backward pass: have `rows` stand there again.

        If nothing in the output tells when that pass begins, layers that it runs again will be refused.
        """
        told = False
        for t in tensors_in(output):
            if t.grad_fn is not None:
                t.register_hook(lambda _grad: self._restore(rows))
                told = True
        if rows is not None and not (told or self._calls):
            self._untold = self.rows = rows

    def _restore(self, rows: Rows | None) -> None:
        task = torch._C._current_graph_task_id()
        if self._task is None or self._task[0] != task:
            self._task, self.rows = (task, rows), rows
            torch.autograd.Variable._execution_engine.queue_callback(self._end)  # type: ignore[attr-defined]
        elif self._task[1] is not rows:
            self._ambiguous = True
            self.rows = self.rows or rows  # so that layers ask, and are told

    def _end(self) -> None:
        self._task, self.rows = None, self._untold
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
        if self._untold is not None and self._task is None:
            if torch._C._current_graph_task_id() != -1:
                raise RoutingError(
                    "a backward pass recomputes layers of a mixed batch (gradient checkpointing), and their rows are "
                    "not known: no tensor with a gradient was found in what the model returned. Let it return tensors "
                    "in tuples, dicts, dataclasses or attributes of objects, or turn checkpointing off."
                )
            self._untold = self.rows = None  # another forward pass, past the model's own
        return self.rows


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Those in containers and in attributes of objects, such as dataclasses and caches, but not of modules."""
    seen: set[int] = set()
    found = [output]
    while found and len(seen) < LIMIT:
        part = found.pop()
        if isinstance(part, (str, bytes, int, float, NoneType, nn.Module, type)) or id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, Tensor):
            yield part
            continue
        if isinstance(part, Mapping):
            found += part.values()
        elif isinstance(part, (list, tuple, set, frozenset)):
            found += part
        found += getattr(part, "__dict__", {}).values()
