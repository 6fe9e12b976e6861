# SPDX-License-Identifier: Apache-2.0
"""The state of the calls of a model: the batch rows of each call by thread, again in its backward pass, and blocks in
which a thread has disabled the adapters.

The model writes this state once per call. Every layer reads it.

`disable_adapter()` is a count in the thread's part of the state. Layers read `open`, which is empty unless some call is
mixed or disabled, and only then ask for their thread's state. Hooks on the model's output set the state again for
layers that a backward pass runs again, in whatever thread. Merged adapters are unmerged when a block begins, and
nothing can be merged while it is open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from threading import enumerate as enumerate_threads
from threading import get_ident, local
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.hooks import unserializable_hook

from graft.core.errors import PeftWarning, RoutingError, warn
from graft.core.gate import Gate
from graft.core.random import AdapterGenerators
from graft.core.rows import ALL_OFF, AMBIGUOUS, NO_FACTS, NOTHING, OFF, CallContext, Facts, Gates, Rows, find_tensors
from graft.kernels.segments import Stacks


class AuxiliaryValue(NamedTuple):
    """A value that a layer recorded during a run, for the loss of an adapter (`Method.compute_auxiliary_loss`)."""

    layer: str
    value: Tensor  # (rows, …)
    rows: Tensor | None  # indices into the batch rows; None: all rows


T = TypeVar("T")
Loss = Tensor | Callable[[], Tensor]  # (), or a function that returns it, which depends on parameters alone


class ThreadState(local):
    """The part of a `Call` that each thread has separately."""

    def __init__(self) -> None:  # runs in each thread
        self.thread = get_ident()  # a compiler can read it, and cannot trace the function
        self.context = NOTHING  # of this thread's call
        self.narrow: CallContext | None = None  # replaces `context` while a layer runs some of the rows
        self.off: list[None] = []  # an entry for each `disable_in_block` block around
        self.tapped: dict[tuple[str, str], Tensor] = {}  # inputs of all rows, by (adapter, the layer that reads them)
        self.handed: dict[str, Tensor] = {}  # by adapter: values of `pass_to_layers`
        self.noted: dict[str, list[AuxiliaryValue]] | None = None  # by adapter; None: no `collect_values` block
        self.backward = -1  # the backward pass (`get_backward`) around that block
        self.losses: dict[str, Loss] = {}  # by adapter: of the last run, if `output.loss` lacks it


@dataclass
class RecomputeContext:
    """The context for layers that one backward pass runs again (gradient checkpointing)."""

    context: CallContext
    threads: tuple[int, int]  # identifiers: the thread of the call, the thread of the backward pass


class Call:
    """The state of the calls of one model, shared by all its adapter layers."""

    def __init__(self) -> None:
        """Begin without calls, blocks and kept contexts, with a new gate."""
        # one entry per reason for layers to ask `current_rows`; append and pop are atomic
        self.open: list[None] = []
        self.thread_state = ThreadState()
        self.blocks: list[frozenset[int | None]] = []  # by `disable_in_block` block: the threads alive when it began
        self.gate = Gate()
        self.averager: object = None  # of gradients, on a sharded base: lives as long as a layer does
        self._restored: dict[int, RecomputeContext] = {}  # by backward pass
        self._last: dict[int, CallContext] = {}  # by thread: of its last call, if no hook restores it

    def __getstate__(self) -> dict[str, object]:
        """Return the state for a pickle or copy: the gate alone. A copy has no calls under way."""
        return {"gate": self.gate}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Initialize a call state without calls under way, then set the attributes in `state`: the gate."""
        Call.__init__(self)
        self.__dict__.update(state)

    @property
    def rows(self) -> Rows | None:
        """The batch rows of this thread's call and their adapters; None if it names none.

        Ignores blocks of `disable_in_block`, `narrow` and backward passes.
        """
        return self.thread_state.context.rows

    @property
    def context(self) -> CallContext:
        """The context of this thread's call.

        Ignores blocks of `disable_in_block`, `narrow` and backward passes.
        """
        return self.thread_state.context

    def swap_context(self, context: CallContext) -> CallContext:
        """Set this thread's context and return the previous one.

        Appends to `open` if the new context is the first that is not empty, and pops from `open` if an empty one
        replaces such a context.
        """
        before, self.thread_state.context = self.thread_state.context, context
        if context and not before:
            self.open.append(None)
        elif before and not context:
            self.open.pop()
        return before

    def use_rows(self, rows: Rows | None, draws: AdapterGenerators | None = None) -> CallBlock:
        """Return a context manager. Within it, layers see `rows`, and `draws`, the random generators of adapters."""
        return CallBlock(self, rows, draws)

    @contextmanager
    def use_context(self, context: CallContext) -> Iterator[None]:
        """Set this thread's context within the block.

        Afterwards restore the context of before the block, even if it was changed within.
        """
        before = self.swap_context(context)
        try:
            yield
        finally:
            self.swap_context(before)

    def extend_context(self, gates: Gates | None = None, facts: Facts = NO_FACTS) -> AbstractContextManager[None]:
        """Return a context manager that sets gates and facts in this thread's context.

        gates: None keeps the present gates. facts: are added to the present facts, and replace those of the same name.
        The thread's context is read when this function is called, not when the block is entered.
        """
        context = self.thread_state.context
        gates, facts = context.gates if gates is None else gates, {**context.facts, **facts} or NO_FACTS
        return self.use_context(context._replace(gates=gates, facts=facts))

    def use_stacks(self, stacks: Stacks | None, copies: int, may_draw: bool) -> AbstractContextManager[None]:
        """Return a context manager that gives this thread a context within its block: a copy with three other values.

        The context is read now, when the manager is made. At the block's start the copy replaces the whole context.

        Args:
            stacks: the stacked tensors of adapters.
            copies: the number of rows that layers get for each row of the base.
            may_draw: draws from torch's own generators are no error, since other threads make them.
        """
        context = self.thread_state.context
        return self.use_context(context._replace(stacks=stacks, copies=copies, may_draw=may_draw))

    @contextmanager
    def set_in_block(self, name: str, value: T) -> Iterator[T]:
        """Set the attribute `name` of this thread's state within the block, and yield `value`.

        Afterwards, also on an error, restore the attribute's value from before the block.
        """
        state = self.thread_state
        before = getattr(state, name)
        setattr(state, name, value)
        try:
            yield value
        finally:
            setattr(state, name, before)

    def pass_to_layers(self, adapter: str, value: Tensor) -> AbstractContextManager[object]:
        """Return a context manager that sets the value that layers get from `value_from_block(adapter)` within the
        block, in this thread. Afterwards the values of before the block are restored.

        The present values of other adapters are read when this function is called, not when the block is entered.
        """
        return self.set_in_block("handed", {**self.thread_state.handed, adapter: value})

    def value_from_block(self, adapter: str) -> Tensor | None:
        """Return the value that a surrounding `pass_to_layers` block of this thread set for an adapter; None without
        such a block.
        """
        return self.thread_state.handed.get(adapter)

    @contextmanager
    def collect_values(self) -> Iterator[dict[str, list[AuxiliaryValue]]]:
        """Collect the values that `record_value` gets in this thread within the block, outside of backward passes that
        begin within it.

        It yields the dict from adapter to its values, filled as layers run. A nested block has a separate dict.
        Afterwards the dict of an outer block, or None, is set again.
        """
        noted: dict[str, list[AuxiliaryValue]] = {}
        with self.set_in_block("backward", get_backward()), self.set_in_block("noted", noted):
            yield noted

    def record_value(self, adapter: str, layer: str, value: Tensor) -> None:
        """Record a value of a layer, per row or a parameter, for `Method.compute_auxiliary_loss`.

        The value keeps its graph.

        The record includes the index of the rows that the layer sees now. Nothing is recorded outside `collect_values`,
        as when a layer is called without the model, nor where a backward pass within that block runs layers again.

        Raises:
            NotImplementedError: gradients are off and the value needs none, as under reentrant gradient checkpointing.
        """
        noted = self.thread_state.noted
        if noted is None or get_backward() != self.thread_state.backward:
            return
        if not (torch.is_grad_enabled() or value.requires_grad):  # a parameter does even under no_grad
            raise NotImplementedError(
                f"Adapter '{adapter}' has a loss of values of layer '{layer}', which ran without gradients in a step "
                "with gradients. Pass use_reentrant=False to gradient checkpointing, or turn the loss off in the "
                "adapter's config."
            )
        noted.setdefault(adapter, []).append(AuxiliaryValue(layer, value, self.current_context().some))

    def loss_of(self, adapter: str) -> Tensor | float:
        """Return the loss that an adapter adds to this thread's last run, (); 0.0 if `output.loss` contains it, or if
        there is none.

        A loss that is a function is computed with gradients enabled, and its result replaces the function.
        """
        loss = self.thread_state.losses.get(adapter, 0.0)
        if callable(loss):
            with torch.enable_grad():
                loss = self.thread_state.losses[adapter] = loss()
        return loss

    @contextmanager
    def disable_in_block(self) -> Iterator[None]:
        """Disable all adapters within the block, for this thread alone.

        Appends to the thread's `off`, to `open`, and to `blocks` the threads that exist now. Removes the three entries
        afterwards, whichever thread leaves the block.
        """
        before, off = live_threads(), self.thread_state.off  # this thread's list: another thread may leave the block
        off.append(None)
        self.open.append(None)
        self.blocks.append(before)
        try:
            yield
        finally:
            off.pop()
            self.open.pop()
            self.blocks.remove(before)

    def _warn_in_new_thread(self) -> None:
        """Warn (PeftWarning) if this thread did not exist when some thread's open `disable_in_block` began: adapters
        are active here.

        Such a thread streams the tokens of `generate`, for example. Nothing is noted: each call warns.
        """
        if any(get_ident() not in before for before in list(self.blocks)):
            warn(
                "This thread was started while another thread is in a disable_adapter() block, and runs the model with "
                "adapters: a block acts on its thread alone. For the base model, open a block in this thread, too.",
                PeftWarning,
            )

    @property
    def off(self) -> bool:
        """True if all adapters are disabled for the present call or backward pass: `current_rows()` returns OFF.

        With an empty `open` False at once.
        """
        return bool(self.open) and self.current_rows() is OFF

    def keep_for_backward(self, output: object, context: CallContext) -> None:
        """Register hooks, so that layers see `context` when the backward pass of `output` runs them again.

        Hooks are set on each tensor with a `grad_fn` in the output and in this thread's losses. In a `disable_in_block`
        block the context is that of disabled adapters. If no tensor has a `grad_fn`, a non-empty context is remembered
        for this thread (unless the thread is within a call): a backward pass that runs layers again then raises
        RoutingError.
        """
        has_hook, thread = False, self.thread_state.thread
        if self.thread_state.off:
            context = ALL_OFF
        losses = (loss for loss in self.thread_state.losses.values() if isinstance(loss, Tensor))
        for t in (*find_tensors(output), *losses):
            if t.grad_fn is not None:
                t.register_hook(unserializable_hook(lambda _grad: self._restore_in_backward(context, thread)))
                has_hook = True
        if context and not (has_hook or self.gate.is_in_call):
            self._remember_context(context)

    def _remember_context(self, context: CallContext) -> None:
        """Remember the context of this thread's last call, which no hook restores for its backward pass.

        An empty context instead forgets the contexts of this thread and of threads that have ended. Each remembered
        context has an entry in `open`.
        """
        if context:
            if self.thread_state.thread not in self._last:
                self.open.append(None)
            self._last[self.thread_state.thread] = context
        elif self._last:
            alive = live_threads()
            for thread in list(self._last):
                ended = thread == self.thread_state.thread or thread not in alive
                if ended and self._last.pop(thread, None) is not None:
                    self.open.pop()

    def _restore_in_backward(self, context: CallContext, thread: int) -> None:
        """Set the context for layers that the present backward pass runs again, until that pass ends.

        The first hook of a pass sets it, appends to `open` if it is not empty, and queues `_end_backward` in the
        autograd engine. A later hook with another context marks the pass as ambiguous, and appends to `open` if the
        first context was empty.

        Args:
            thread: the thread of the call.
        """
        task = torch._C._current_graph_task_id()
        known = self._restored.get(task)
        if known is None:
            self._restored[task] = RecomputeContext(context, (thread, get_ident()))
            if context:
                self.open.append(None)
            end = partial(self._end_backward, task)
            torch.autograd.Variable._execution_engine.queue_callback(end)
        elif known.context.identity != context.identity:
            if not known.context:
                self.open.append(None)  # so that layers ask, and get an error
            known.context = AMBIGUOUS

    def _end_backward(self, task: int) -> None:
        """Remove the context of a backward pass, and its entry in `open`.

        Does nothing if the context is removed already. Only a pass that has put a context in `open` takes the last
        entry out of it.

        Args:
            task: the id of the backward pass in autograd.
        """
        restored = self._restored.pop(task, None)
        if restored is not None and restored.context:
            self.open.pop()

    def _drop_stale_contexts(self) -> None:
        """Remove contexts of backward passes that failed, so that their end never ran.

        Within a backward pass does nothing.

        A pass counts as failed if it ran in this thread. So does one of a call of this thread if its own thread has
        ended.
        """
        if self._restored and torch._C._current_graph_task_id() == -1:
            this_thread, alive = get_ident(), live_threads()
            for task, restored in list(self._restored.items()):
                call_thread, backward_thread = restored.threads
                if this_thread == backward_thread or (this_thread == call_thread and backward_thread not in alive):
                    self._end_backward(task)

    def current_rows(self) -> Rows | None:
        """Return the batch rows for the layer that asks, and their adapters; None if no rows are named, OFF if all
        adapters are disabled. Raises RoutingError as `current_context` does.
        """
        return self.current_context().rows

    def current_gates(self) -> Gates | None:
        """Return the gates for the layer that asks; None if there are none, or if `open` is empty.

        Raises RoutingError as `current_context` does.
        """
        return self.current_context().gates if self.open else None

    def fact(self, name: object) -> Any:
        """Return the fact of this name (a value per row) from the context for the layer that asks; None if there is
        none.

        Raises RoutingError as `current_context` does.
        """
        return self.current_context().facts.get(name)

    def input_of_tap(self, adapter: str, layer: str) -> Tensor:
        """Return the input that a `Tap` of an adapter stored for a layer, cut to the rows that the layer sees now.

        Raises:
            RoutingError: there is none, since the layer with the tap has not run.
        """
        x, index = self.thread_state.tapped.get((adapter, layer)), self.current_context().some
        if x is None:
            raise RoutingError(
                f"Adapter '{adapter}' of layer '{layer}' needs the input of a layer that runs before it, which has not "
                "run in this block. Call the block as a whole."
            )
        return x if index is None else x.index_select(0, index)

    def current_context(self) -> CallContext:
        """Return the context for the layer that asks, in this order.

        - Within `narrow`: that context.
        - Within a backward pass, if a context is kept for any: the context of the pass's call.
        - Within `disable_in_block`: the context of disabled adapters. Else this thread's context.

        In a forward pass, contexts of failed backward passes and those that `_remember_context` holds for this thread
        are dropped.

        Raises:
            RoutingError: a backward pass runs the layer again, and the pass's call is unknown or ambiguous.
        """
        state = self.thread_state
        if state.narrow is not None:
            return state.narrow
        if self._restored or self._last:
            if torch._C._current_graph_task_id() != -1:
                return self._context_in_backward()
            self._drop_stale_contexts()
            self._remember_context(NOTHING)  # a forward pass of a layer without a call of the model
        return ALL_OFF if state.off else state.context

    def _context_in_backward(self) -> CallContext:
        """Return the context of the call that the present backward pass differentiates.

        A nested backward pass gets the context of the passes of its thread (of all passes if the thread has none), if
        they agree. If none is known, and the thread's last call and the thread itself have adapters disabled, the
        context is that of disabled adapters.

        Raises:
            RoutingError: no context is known for the pass, or the pass covers calls with different rows, facts, gates
                or disabled adapters.
        """
        restored = self._restored.get(torch._C._current_graph_task_id())
        if restored is None and self._restored:  # a backward pass within another
            passes = list(self._restored.values())
            passes = [r for r in passes if get_ident() in r.threads] or passes
            contexts = {r.context.identity: r for r in passes}
            restored = passes[0] if len(contexts) == 1 else RecomputeContext(AMBIGUOUS, (0, 0))
        last = self._last.get(self.thread_state.thread)
        if restored is None and last is not None and last.rows is OFF and self.thread_state.off:
            return ALL_OFF
        if restored is None:
            raise RoutingError(
                "Gradient checkpointing recomputes layers of a mixed batch or of a call with disabled adapters, and "
                "the model's output has no tensor with a gradient to tell the call. Return tensors in tuples, dicts, "
                "dataclasses or attributes of objects, or turn checkpointing off."
            )
        if restored.context is AMBIGUOUS:
            raise RoutingError(
                "One backward pass under gradient checkpointing covers forward passes with different rows, facts, "
                "gates or disabled adapters, so that a recomputed layer cannot tell its call. Call backward() after "
                "each forward, or turn checkpointing off."
            )
        return restored.context


def get_backward() -> int:
    """Return the number of the backward pass that runs in this thread; -1 if there is none, and for a compiler."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def live_threads() -> frozenset[int | None]:
    """Return a frozenset of the identifiers of all threads that are alive now."""
    return frozenset(thread.ident for thread in enumerate_threads())


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook that runs in the present thread alone. In other threads it does nothing and returns None."""
    thread = get_ident()
    return lambda *args, **kwargs: hook(*args, **kwargs) if get_ident() == thread else None


class CallBlock:
    """The block of `Call.use_rows`: a class, since the compiler of torch 2.6 traces no generator."""

    def __init__(self, call: Call, rows: Rows | None, draws: AdapterGenerators | None):
        self.call, self.rows, self.draws = call, rows, draws

    def __enter__(self) -> None:
        """Set the rows and draws in this thread's context, and keep the former context as `before`.

        Drops stale contexts of failed backward passes and of this thread's last call, and the losses of its last run.
        Warns if another thread is in a `disable_in_block` block and this thread may have been started for it.
        """
        call = self.call
        call._drop_stale_contexts()
        call._remember_context(NOTHING)
        if call.thread_state.losses:
            call.thread_state.losses.clear()
        if call.blocks and not call.thread_state.off and not torch.compiler.is_compiling():
            call._warn_in_new_thread()
        context = call.thread_state.context
        if context.rows is not self.rows or context.draws is not self.draws:
            context = context._replace(rows=self.rows, draws=self.draws)
        self.before = call.swap_context(context)

    def __exit__(self, *raised: object) -> None:
        """Restore the context of before, and drop inputs that taps stored in blocks that failed."""
        self.call.swap_context(self.before)
        if self.call.thread_state.tapped:  # stored in blocks that raised
            self.call.thread_state.tapped.clear()
