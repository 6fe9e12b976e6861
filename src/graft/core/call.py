# SPDX-License-Identifier: Apache-2.0
"""The state of a call: which adapter each row of the batch uses, how much adapters count, facts about each row such as
task ids, and whether adapters are disabled for this thread.

The model writes it once per call, every layer reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from threading import enumerate as enumerate_threads
from threading import get_ident, local
from types import NoneType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from graft.core.errors import PeftWarning, RoutingError, warn

BASE = "__base__"  # the row uses no adapter
LIMIT = 100_000  # objects of an output that `tensors_in` visits


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
        """The index that puts the concatenated segments back into the order of the batch."""
        return torch.argsort(torch.cat([index for _, index in self.segments]))

    @cached_property
    def grouped(self) -> tuple[list[str], Tensor, list[int], bool] | None:
        """The adapters, their rows, adapter by adapter, how many each has, and whether this is the batch as it stands;
        None unless there are several adapters."""
        own = [(name, index) for name, index in self.segments if name is not None]
        if len(own) < 2:
            return None
        order = torch.cat([index for _, index in own])
        in_order = len(order) == self.batch and order.tolist() == list(range(self.batch))
        return [name for name, _ in own], order, [len(index) for _, index in own], in_order

    def take(self, x: Tensor, layer: str, ids: bool = False) -> Tensor:
        """Return `x` with one row per sample. Repeat ids that all samples share, such as positions."""
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
    """Return how often the `generate` of a model repeats each row: for beams, or for several samples."""
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    settings = ("num_beams", "num_return_sequences")
    return max(kwargs.get(s) or getattr(config, s, None) or 1 for s in settings)


class Gates(Protocol):
    """The weight of each adapter in a call, for mixtures of adapters."""

    def apply(self, layer: Any, adapter: str, part: Tensor) -> Tensor:
        """Weigh the part that `adapter` adds to the output of `layer`."""
        ...

    def rows(self, index: Tensor) -> Gates:
        """Return the gates of some rows of the batch."""
        ...


OFF = Rows(0, ())  # stands for a call with all adapters disabled
UNCLEAR = Rows(0, ())  # stands for the rows of a backward pass over calls with different rows


class PerRow(Protocol):
    """A fact about each row of a batch: a tensor, or what can be indexed and repeated like one."""

    def __getitem__(self, index: Any, /) -> Any: ...
    def repeat_interleave(self, repeats: int, dim: int) -> Any: ...


NO_FACTS: Mapping[Any, Any] = {}  # one object: identity tells calls without facts


class Given(NamedTuple):
    """All that a call says of its rows."""

    rows: Rows | None = None
    gates: Gates | None = None
    facts: Mapping[Any, PerRow] = NO_FACTS

    def __bool__(self) -> bool:
        return self.rows is not None or self.gates is not None or bool(self.facts)

    @property
    def identity(self) -> tuple[int, int, int]:
        """Equal for what is of one call."""
        return id(self.rows), id(self.gates), id(self.facts)

    def only(self, index: Tensor) -> Given:
        """Return gates and facts of some rows of the batch."""
        gates = None if self.gates is None else self.gates.rows(index)
        return Given(self.rows, gates, {name: fact[index] for name, fact in self.facts.items()} or NO_FACTS)

    def repeated(self, copies: int) -> Given:
        """Return the same for a batch with `copies` of each row. Whoever makes gates makes them for that batch."""
        rows = self.rows
        if rows is not None:
            names = [name for name, index in rows.segments for _ in index.tolist()]
            inverse = rows.inverse.tolist()
            names = [names[i] for i in inverse for _ in range(copies)]
            rows = Rows.of([BASE if n is None else n for n in names], rows.segments[0][1].device)
        return Given(rows, self.gates, {k: v.repeat_interleave(copies, 0) for k, v in self.facts.items()} or NO_FACTS)


NOTHING, ALL_OFF, AMBIGUOUS = Given(), Given(OFF), Given(UNCLEAR)


@dataclass
class Run:
    """A run of the model that is about to begin, for `Method.around`, which may change `kwargs`."""

    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]
    own: dict[str, Any]  # arguments that are graft's and not the model's
    rows: Rows | None = None
    generates: bool = False  # the model's `generate` runs, and it its forward several times
    copies: int = 1  # of each row, which `generate` makes
    adapters: Sequence[str] = ()  # those that act and are of the class whose `around` is called

    def argument(self, name: str) -> Any:
        """Return an argument of the model; the caller need not name the first."""
        value = self.kwargs.get(name)
        return self.inputs[0] if value is None and name == "input_ids" and self.inputs else value


class Here(local):
    """The part of a Call that is of one thread."""

    def __init__(self) -> None:  # runs in each thread
        self.thread = get_ident()  # a compiler can read it, and cannot trace the function
        self.given = NOTHING  # of the thread's call
        self.narrow: Given | None = None  # the part of it that a layer sees while it runs some of the rows
        self.off: list[None] = []  # blocks of `disabled` around it


@dataclass
class Restored:
    """What is given for layers that a backward pass runs again."""

    given: Given
    threads: tuple[int, int]  # that of the call, and that of the backward pass


class Call:
    """The state of the calls under way. One object per model, shared by all its adapter layers."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}  # values that layers hand on to those that run later
        # an entry for each thing for which layers have to ask `current`: no thread comes between append and pop
        self.open: list[None] = []
        self.here = Here()
        self.blocks: list[frozenset[int | None]] = []  # of `disabled`: the threads that there were when each began
        self._calls: dict[int, Rows | None] = {}  # of the calls under way, by thread
        self._restored: dict[int, Restored] = {}  # by backward pass
        self._untold = NOTHING  # of the last call, if nothing will put it back for its backward pass

    def __getstate__(self) -> dict[str, Any]:
        """Leave calls under way out: a copy is in none."""
        return {"state": self.state}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        Call.__init__(self)
        self.__dict__.update(kept)

    @property
    def rows(self) -> Rows | None:
        """The rows of this thread's call."""
        return self.here.given.rows

    @rows.setter
    def rows(self, rows: Rows | None) -> None:
        self.put(self.here.given._replace(rows=rows))

    @property
    def given(self) -> Given:
        """All that this thread's call says of its rows."""
        return self.here.given

    def put(self, given: Given) -> Given:
        """Have all this stand here for this thread; return what did."""
        before, self.here.given = self.here.given, given
        if given and not before:
            self.open.append(None)
        elif before and not given:
            self.open.pop()
        return before

    @contextmanager
    def using(self, rows: Rows | None) -> Iterator[None]:
        """Show `rows` to the layers within the block.

        Raises:
            RoutingError: other threads run the model as well, and this batch or theirs is mixed.
        """
        self._drop_stale()
        self._tell(NOTHING)
        if self.blocks and not self.here.off and not torch.compiler.is_compiling():
            self._warn_of_block()
        with self._alone(rows):
            before = self.put(self.here.given._replace(rows=rows))
            try:
                yield
            finally:
                self.put(before)

    @contextmanager
    def giving(self, gates: Gates | None = None, facts: Mapping[Any, PerRow] = NO_FACTS) -> Iterator[None]:
        """Have `gates`, and `facts` beside those that are here, stand here within the block."""
        given = self.here.given
        gates, facts = given.gates if gates is None else gates, {**given.facts, **facts} or NO_FACTS
        before = self.put(Given(given.rows, gates, facts))
        try:
            yield
        finally:
            self.put(before)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Disable all adapters within the block, for this thread alone."""
        before, off = threads_now(), self.here.off  # of this thread, whichever leaves the block
        off.append(None)
        self.open.append(None)
        self.blocks.append(before)
        try:
            yield
        finally:
            off.pop()
            self.open.pop()
            self.blocks.remove(before)

    def _warn_of_block(self) -> None:
        """Warn in a thread that may have been started for a block, such as one that streams what `generate` makes."""
        if any(get_ident() not in before for before in list(self.blocks)):
            warn(
                "This thread was started while another one is in a disable_adapter() block, and runs the model with "
                "adapters: a block holds for the thread that is in it. For the base model, open one in this thread.",
                PeftWarning,
            )

    @property
    def off(self) -> bool:
        """True within a call for which all adapters are disabled."""
        return bool(self.open) and self.current() is OFF

    def by_itself(self) -> AbstractContextManager[None]:
        """Keep other threads from calling the model within the block, which writes to its weights.

        Raises:
            RoutingError: one calls it now; or it does meanwhile, and gets the error.
        """
        return self._alone(WRITING)

    @contextmanager
    def _alone(self, rows: Rows | None) -> Iterator[None]:
        calls, thread = self._calls, 0 if torch.compiler.is_compiling() else get_ident()
        nested, outer = thread in calls, calls.get(thread)
        calls[thread] = rows  # before the others are looked at, so that of two threads one at least sees the other
        try:
            if len(calls) > 1 and any(r is not None for r in list(calls.values())):
                raise RoutingError(WHILE_WRITING if any(r is WRITING for r in list(calls.values())) else TWO_THREADS)
            yield
        finally:
            if nested:
                calls[thread] = outer
            else:
                del calls[thread]

    def keep_for_backward(self, output: Any, given: Given) -> None:
        """Show all this again in the backward pass, in which gradient checkpointing runs layers again.

        If nothing in the output tells when that pass begins, layers refuse to run again.
        """
        told, thread = False, self.here.thread
        if self.here.off:
            given = ALL_OFF
        for t in tensors_in(output):
            if t.grad_fn is not None:
                t.register_hook(lambda _grad: self._restore(given, thread))
                told = True
        if given and not (told or self._calls):
            self._tell(given)

    def _tell(self, untold: Given) -> None:
        before, self._untold = self._untold, untold
        if untold and not before:
            self.open.append(None)
        elif before and not untold:
            self.open.pop()

    def _restore(self, given: Given, thread: int) -> None:
        task = torch._C._current_graph_task_id()
        known = self._restored.get(task)
        if known is None:
            self._restored[task] = Restored(given, (thread, get_ident()))
            if given:
                self.open.append(None)
            end = partial(self._end, task)
            torch.autograd.Variable._execution_engine.queue_callback(end)
        elif known.given.identity != given.identity:
            if not known.given:
                self.open.append(None)  # so that layers ask, and are told
            known.given = AMBIGUOUS

    def _end(self, task: int) -> None:
        restored = self._restored.pop(task, None)
        if restored is not None and restored.given:
            self.open.pop()

    def _drop_stale(self) -> None:
        """Drop the rows of a backward pass that failed, and so never came to its end."""
        if self._restored and torch._C._current_graph_task_id() == -1:
            here, alive = get_ident(), threads_now()
            for task, restored in list(self._restored.items()):
                own, passing = restored.threads
                if here == passing or (here == own and passing not in alive):  # it would be in there
                    self._end(task)

    def current(self) -> Rows | None:
        """Return the rows of the call that a layer is in, if it has any; OFF if adapters are disabled for it."""
        return self.now().rows

    def weights(self) -> Gates | None:
        """Return the gates of the call that a layer is in."""
        return self.now().gates

    def fact(self, name: Any) -> Any:
        """Return a fact about each row that a layer sees now; None if nobody gave it."""
        return self.now().facts.get(name)

    def now(self) -> Given:
        """Return all that is given for the layer that asks.

        Raises:
            RoutingError: the backward pass runs the layer again, and it is not known for which call.
        """
        here = self.here
        if here.narrow is not None:
            return here.narrow
        if self._restored or self._untold:
            if torch._C._current_graph_task_id() != -1:
                return self._in_backward()
            self._drop_stale()
            self._tell(NOTHING)  # another forward pass, past the model's own
        return ALL_OFF if here.off else here.given

    def narrowed(self, given: Given | None) -> Given | None:
        """Have a layer see only this while it runs some of the rows; return what stood here, to be put back."""
        before, self.here.narrow = self.here.narrow, given
        return before

    def _in_backward(self) -> Given:
        own = self._restored.get(torch._C._current_graph_task_id())
        if own is None and self._restored:  # a pass within one
            some = list(self._restored.values())
            some = [r for r in some if get_ident() in r.threads] or some
            found = {r.given.identity: r for r in some}
            own = some[0] if len(found) == 1 else Restored(AMBIGUOUS, (0, 0))
        if own is None and self._untold.rows is OFF and self.here.off:
            return ALL_OFF
        if own is None:
            raise RoutingError(
                "a backward pass recomputes layers of a mixed batch (gradient checkpointing), and their rows are not "
                "known, or of a call with disabled adapters: no tensor with a gradient was found in what the model "
                "returned. Let it return tensors in tuples, dicts, dataclasses or attributes of objects, or turn "
                "checkpointing off."
            )
        if own.given.rows is UNCLEAR:
            raise RoutingError(
                "one backward pass covers two mixed-batch forward passes (or one with disabled adapters) under "
                "gradient checkpointing, so the rows of a recomputed layer are ambiguous (or their task ids, "
                "invocations, gates). Call backward() after each forward, or turn checkpointing off."
            )
        return own.given


WRITING = Rows(0, ())  # stands for a thread that changes weights
TWO_THREADS = (
    "two threads run this model at once, and at least one of the batches is mixed (adapter_names), so that its rows "
    "would be taken for those of the other. Run mixed batches one after another."
)
WHILE_WRITING = (
    "a thread takes merged adapters out of the weights (disable_adapter() does) while another one runs the model. Call "
    "unmerge_adapter() before several threads run it, or keep adapters unmerged."
)


def threads_now() -> frozenset[int | None]:
    return frozenset(thread.ident for thread in enumerate_threads())


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Yield the tensors in containers and in attributes of objects, such as dataclasses and caches, but not modules."""
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
