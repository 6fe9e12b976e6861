# SPDX-License-Identifier: Apache-2.0
"""The state of the calls under way: what each says of its rows, by thread and again in its backward pass, and whether
adapters are disabled for this thread.

The model writes it once per call, every layer reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from threading import enumerate as enumerate_threads
from threading import get_ident, local
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import unserializable_hook

from graft.core.errors import PeftWarning, RoutingError, warn
from graft.core.gate import Gate
from graft.core.random import AdapterGenerators
from graft.core.rows import (
    ALL_OFF,
    AMBIGUOUS,
    NO_FACTS,
    NOTHING,
    OFF,
    UNCLEAR,
    CallContext,
    Facts,
    Gates,
    Rows,
    find_tensors,
)
from graft.kernels.segments import Stacks


class AuxiliaryValue(NamedTuple):
    """A value that a layer noted in a run, for the loss of an adapter (`Method.compute_auxiliary_loss`)."""

    layer: str
    value: Tensor  # (rows, …)
    rows: Tensor | None  # which of the batch; None: all


Loss = Tensor | Callable[[], Tensor]  # (), or what computes it for those who ask: of parameters, not of the run


class ThreadState(local):
    """The part of a Call that is of one thread."""

    def __init__(self) -> None:  # runs in each thread
        self.thread = get_ident()  # a compiler can read it, and cannot trace the function
        self.context = NOTHING  # of the thread's call
        self.narrow: CallContext | None = None  # the part of it that a layer sees while it runs some of the rows
        self.off: list[None] = []  # blocks of `disabled` around it
        self.tapped: dict[tuple[str, str], Tensor] = {}  # inputs of all rows, by adapter and the layer that reads them
        self.handed: dict[str, Tensor] = {}  # by adapter: from a block that runs to its layers within
        self.noted: dict[str, list[AuxiliaryValue]] | None = None  # by adapter; None: nobody asks
        self.losses: dict[str, Loss] = {}  # by adapter: of the last run, that no loss of its output has taken in


@dataclass
class RecomputeContext:
    """What is given for layers that a backward pass runs again."""

    context: CallContext
    threads: tuple[int, int]  # that of the call, and that of the backward pass


class Call:
    """The state of the calls under way. One object per model, shared by all its adapter layers."""

    def __init__(self) -> None:
        # an entry for each thing for which layers have to ask `current_rows`: no thread comes between append and pop
        self.open: list[None] = []
        self.thread_state = ThreadState()
        self.blocks: list[frozenset[int | None]] = []  # of `disabled`: the threads that there were when each began
        self.gate = Gate()
        self._restored: dict[int, RecomputeContext] = {}  # by backward pass
        self._last: dict[int, CallContext] = {}  # by thread: of its last call, if nothing will put it back

    def __getstate__(self) -> dict[str, object]:
        """Leave calls under way out: a copy is in none."""
        return {"gate": self.gate}

    def __setstate__(self, state: dict[str, object]) -> None:
        Call.__init__(self)
        self.__dict__.update(state)

    @property
    def rows(self) -> Rows | None:
        """The rows of this thread's call."""
        return self.thread_state.context.rows

    @property
    def context(self) -> CallContext:
        """All that this thread's call says of its rows."""
        return self.thread_state.context

    def swap_context(self, context: CallContext) -> CallContext:
        """Have all this stand here for this thread; return what did."""
        before, self.thread_state.context = self.thread_state.context, context
        if context and not before:
            self.open.append(None)
        elif before and not context:
            self.open.pop()
        return before

    def use_rows(self, rows: Rows | None, draws: AdapterGenerators | None = None) -> CallBlock:
        """Show `rows`, and the generators from which adapters draw, to the layers within the block."""
        return CallBlock(self, rows, draws)

    @contextmanager
    def use_context(self, context: CallContext) -> Iterator[None]:
        """Have all this stand here for this thread within the block; then what did, whatever came meanwhile."""
        before = self.swap_context(context)
        try:
            yield
        finally:
            self.swap_context(before)

    def extend_context(self, gates: Gates | None = None, facts: Facts = NO_FACTS) -> AbstractContextManager[None]:
        """Have `gates`, and `facts` beside those that are here, stand here within the block."""
        context = self.thread_state.context
        gates, facts = context.gates if gates is None else gates, {**context.facts, **facts} or NO_FACTS
        return self.use_context(context._replace(gates=gates, facts=facts))

    def use_stacks(self, stacks: Stacks | None, copies: int) -> AbstractContextManager[None]:
        """Have the layers know within the block which tensors of adapters are stacked, and that they get so many copies
        of each row that the base gets."""
        return self.use_context(self.thread_state.context._replace(stacks=stacks, copies=copies))

    @contextmanager
    def pass_to_layers(self, adapter: str, value: Tensor) -> Iterator[None]:
        """Have layers of an adapter see a value (`handed`) while a block runs that is around them."""
        handed = self.thread_state.handed
        before = handed.get(adapter)
        handed[adapter] = value
        try:
            yield
        finally:
            if before is None:
                del handed[adapter]
            else:
                handed[adapter] = before

    def handed(self, adapter: str) -> Tensor | None:
        """Return the value that a block around the layer that asks has for the adapter; None if none runs."""
        return self.thread_state.handed.get(adapter)

    @contextmanager
    def collect_values(self) -> Iterator[dict[str, list[AuxiliaryValue]]]:
        """Collect what layers note within the block, by adapter."""
        noted: dict[str, list[AuxiliaryValue]] = {}
        before, self.thread_state.noted = self.thread_state.noted, noted
        try:
            yield noted
        finally:
            self.thread_state.noted = before

    def record_value(self, adapter: str, layer: str, value: Tensor) -> None:
        """Pass a layer's values by row, or a parameter, to `Method.compute_auxiliary_loss` after a run, with gradients.

        A layer that a backward pass runs again notes nothing, nor one that is called past the model.

        Raises:
            NotImplementedError: the value has no graph, in a run that has gradients.
        """
        noted = self.thread_state.noted
        if noted is None or (not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1):
            return
        if not (torch.is_grad_enabled() or value.requires_grad):  # as a parameter does anywhere
            raise NotImplementedError(
                f"Adapter '{adapter}' has a loss of what layer '{layer}' does, which ran without gradients in a step "
                "that has them: pass use_reentrant=False to gradient checkpointing, or turn the loss off in the "
                "adapter's config."
            )
        noted.setdefault(adapter, []).append(AuxiliaryValue(layer, value, self.current_context().some))

    def loss_of(self, adapter: str) -> Tensor | float:
        """Return what an adapter adds to the loss of this thread's last run, (): 0.0 if its output's loss has it."""
        loss = self.thread_state.losses.get(adapter, 0.0)
        if callable(loss):
            with torch.enable_grad():
                loss = self.thread_state.losses[adapter] = loss()
        return loss

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Disable all adapters within the block, for this thread alone."""
        before, off = live_threads(), self.thread_state.off  # of this thread, whichever leaves the block
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
        return bool(self.open) and self.current_rows() is OFF

    def keep_for_backward(self, output: object, context: CallContext) -> None:
        """Show all this again in the backward pass, in which gradient checkpointing runs layers again.

        If nothing in the output tells when that pass begins, layers refuse to run again.
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
        """Note what was given for this thread's last call, if nothing will put it back for its backward pass."""
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
                self.open.append(None)  # so that layers ask, and are told
            known.context = AMBIGUOUS

    def _end_backward(self, task: int) -> None:
        restored = self._restored.pop(task, None)
        if restored is not None and restored.context:
            self.open.pop()

    def _drop_stale_contexts(self) -> None:
        """Drop the rows of a backward pass that failed, and so never came to its end."""
        if self._restored and torch._C._current_graph_task_id() == -1:
            this_thread, alive = get_ident(), live_threads()
            for task, restored in list(self._restored.items()):
                call_thread, backward_thread = restored.threads
                if this_thread == backward_thread or (
                    this_thread == call_thread and backward_thread not in alive
                ):  # it would be in there
                    self._end_backward(task)

    def current_rows(self) -> Rows | None:
        """Return the rows of the call that a layer is in, if it has any; OFF if adapters are disabled for it."""
        return self.current_context().rows

    def current_gates(self) -> Gates | None:
        """Return the gates of the call that a layer is in; None if it has none."""
        return self.current_context().gates if self.open else None

    def fact(self, name: object) -> Any:
        """Return a fact about each row that a layer sees now; None if nobody gave it."""
        return self.current_context().facts.get(name)

    def tapped(self, adapter: str, layer: str) -> Tensor:
        """Return the input that a `Tap` of an adapter keeps for a layer, of the rows that the layer sees now.

        Raises:
            RoutingError: it keeps none, as the tap's layer has not run.
        """
        x, index = self.thread_state.tapped.get((adapter, layer)), self.current_context().some
        if x is None:
            raise RoutingError(
                f"Adapter '{adapter}' of layer '{layer}' needs the input of a layer that runs before it, which has not "
                "run in this block: call the block as a whole."
            )
        return x if index is None else x.index_select(0, index)

    def current_context(self) -> CallContext:
        """Return all that is given for the layer that asks.

        Raises:
            RoutingError: the backward pass runs the layer again, and it is not known for which call.
        """
        state = self.thread_state
        if state.narrow is not None:
            return state.narrow
        if self._restored or self._last:
            if torch._C._current_graph_task_id() != -1:
                return self._context_in_backward()
            self._drop_stale_contexts()
            self._remember_context(NOTHING)  # another forward pass, past the model's own
        return ALL_OFF if state.off else state.context

    @contextmanager
    def narrow_context(self, context: CallContext) -> Iterator[None]:
        """Have a layer see only this within the block, while it runs some of the rows."""
        before, self.thread_state.narrow = self.thread_state.narrow, context
        try:
            yield
        finally:
            self.thread_state.narrow = before

    def _context_in_backward(self) -> CallContext:
        restored = self._restored.get(torch._C._current_graph_task_id())
        if restored is None and self._restored:  # a pass within one
            passes = list(self._restored.values())
            passes = [r for r in passes if get_ident() in r.threads] or passes
            contexts = {r.context.identity: r for r in passes}
            restored = passes[0] if len(contexts) == 1 else RecomputeContext(AMBIGUOUS, (0, 0))
        last = self._last.get(self.thread_state.thread)
        if restored is None and last is not None and last.rows is OFF and self.thread_state.off:
            return ALL_OFF
        if restored is None:
            raise RoutingError(
                "a backward pass recomputes layers of a mixed batch (gradient checkpointing), and their rows are not "
                "known, or of a call with disabled adapters: no tensor with a gradient was found in what the model "
                "returned. Let it return tensors in tuples, dicts, dataclasses or attributes of objects, or turn "
                "checkpointing off."
            )
        if restored.context.rows is UNCLEAR:
            raise RoutingError(
                "one backward pass covers two mixed-batch forward passes (or one with disabled adapters) under "
                "gradient checkpointing, so the rows of a recomputed layer are ambiguous (or their task ids, "
                "invocations, gates). Call backward() after each forward, or turn checkpointing off."
            )
        return restored.context


def live_threads() -> frozenset[int | None]:
    return frozenset(thread.ident for thread in enumerate_threads())


class CallBlock:
    """A block of `Call.use_rows`. The compiler of torch 2.6 looks into classes, and into no generator."""

    def __init__(self, call: Call, rows: Rows | None, draws: AdapterGenerators | None):
        self.call, self.rows, self.draws = call, rows, draws

    def __enter__(self) -> None:
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
        self.call.swap_context(self.before)
        if self.call.thread_state.tapped:  # of blocks that failed
            self.call.thread_state.tapped.clear()
