# SPDX-License-Identifier: Apache-2.0
"""The gate of a model: calls pass it side by side, a change has it alone, so that a call sees one state from its
beginning to its end.

- A call (forward, `generate`, a request of slots) says so by `Gate.call`, a change (of what is active or merged, or of
  adapters' tensors) by `Gate.change`. A change waits until the calls under way have ended, and calls that come
  meanwhile wait for it. Those that waited for one change go in before the next one, so that neither kind starves.
- Calls within a call or a change of the same thread pass, and so do parts of a change. A change within a call cannot
  wait for that call: it acts if it touches no adapter that a call under way uses, and is refused otherwise.
- A late change (`Gate.change(…, late=True)`, `prepares`) has a first part that runs next to calls: other changes wait
  from there on, calls only from the first `change` within it on.
- A call that finds the gate open takes no lock. It notes itself and then looks for a change; a change is noted and then
  looks for calls: one at least sees the other.
- All is by thread. What a backward pass runs again in autograd's threads is in no call, compiled code passes by, copies
  and child processes begin with an open gate.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from functools import wraps
from threading import Condition, RLock, get_ident
from threading import enumerate as enumerate_threads
from typing import Any, TypeVar
from weakref import WeakSet

from graft.core.errors import InUseError

PATIENCE = 300.0  # seconds that a change waits for calls, and a call for a change, unless the model says otherwise
ACTIVE = ""  # among the names that calls use and changes touch: which adapters are active
F = TypeVar("F", bound=Callable[..., object])
Names = Collection[str] | None  # None: all, and the base


def is_conflict(touches: Names, uses: Names) -> bool:
    """Return True if a change that touches some adapters changes what a call computes that uses others."""
    if touches is None:
        return True
    return bool(touches) if uses is None else any(name in uses for name in touches)


def all_adapters(*_: object, **__: object) -> Names:
    """Return what stands for all adapters, and the base."""
    return None


def adapters_of_deletion(adapter: str, active: Collection[str]) -> Names:
    """Return what a deletion of an adapter touches, where these are active."""
    return (adapter, ACTIVE) if adapter in active else (adapter,)


class RunningCall:
    """A call under way."""

    __slots__ = ("gate", "outer", "thread", "uses", "what")

    def __init__(self, gate: Gate, what: str, uses: Callable[[], Names]):
        self.gate, self.what, self.uses = gate, what, uses

    def __enter__(self) -> RunningCall:
        gate = self.gate
        calls = gate.calls
        self.thread = thread = get_ident()
        self.outer: RunningCall | None = calls.get(thread)
        calls[thread] = self  # before it looks for a change
        if gate.closed_by is not None and self.outer is None:
            gate.wait_for_change(self)
        return self

    def __exit__(self, *_: object) -> None:
        gate = self.gate
        if self.outer is None:
            gate.calls.pop(self.thread, None)
        else:
            gate.calls[self.thread] = self.outer
        if gate.closed_by is not None:
            gate.notify_change()

    def __str__(self) -> str:
        return f"{self.what}{adapters_suffix(self.uses())} in thread '{thread_name(self.thread)}'"


class ModelChange:
    """A change under way, or a part of one."""

    __slots__ = ("before", "closed", "gate", "late", "thread", "touches", "what", "whole", "within")

    def __init__(self, gate: Gate, what: str, touches: Names, late: bool):
        self.gate, self.what, self.touches, self.late = gate, what, touches, late
        self.closed = False
        self.before: tuple[ModelChange | None, ModelChange | None] = (None, None)

    def __enter__(self) -> ModelChange:
        gate = self.gate
        self.thread, whole = get_ident(), gate.turn_of
        self.within = gate.calls.get(self.thread)
        if whole is not None and whole.thread == self.thread and whole.within is self.within:
            self.whole: ModelChange | None = whole
            if not (self.late or whole.closed):
                whole.close_gate(self.touches)
            return self
        self.whole = None
        if self.within is not None:
            gate.check_change_within_call(self, self.touches)
            got = gate.turn.acquire(blocking=False)  # another change may wait for the call of this thread
        else:
            got = gate.turn.acquire(timeout=-1 if gate.timeout is None else gate.timeout)
        if not got:
            raise InUseError(gate.why_no_turn(self))
        self.before, gate.turn_of = (gate.turn_of, None), self
        try:
            if not self.late:
                self.close_gate(self.touches)
        except BaseException:
            gate.turn_of = self.before[0]
            gate.turn.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.whole is None:
            if self.closed:
                self.open_gate()
            self.gate.turn_of = self.before[0]
            self.gate.turn.release()

    def close_gate(self, touches: Names = ()) -> None:
        """Wait until no call is under way; none begins until the change has ended.

        touches: further adapters that it touches.

        Raises:
            InUseError: calls went on for longer than the gate's timeout; or this thread is in a call, and the change
                would tear it or another.
        """
        gate = self.gate
        if self.whole is not None:
            self.whole.close_gate(touches)
            return
        if self.closed:
            return
        if self.within is not None:
            gate.check_change_within_call(self, touches)
        with gate.state_changed:
            self.before = (self.before[0], gate.closed_by)
            gate.closed_by = self  # before it looks for calls
            ended = self.within is not None or not gate.calls
            try:
                ended = ended or gate.state_changed.wait_for(lambda: not gate.calls, gate.timeout)
            finally:
                if not ended:
                    running = gate.describe_calls()
                    self.open_gate()
        if not ended:
            raise InUseError(
                f"{self.what} waited {gate.timeout:g} s for calls of the model to end, and these go on: {running}. "
                f"Nothing has changed. {REMEDY}"
            )
        self.closed = True

    def open_gate(self) -> None:
        """Let in the calls that waited for this change: as calls under way, which the next change sees."""
        gate = self.gate
        with gate.state_changed:
            gate.closed_by = self.before[1]
            if gate.closed_by is None:
                gate.calls.update(gate.waiting)
                gate.waiting.clear()
                gate.state_changed.notify_all()


class Gate:
    """The gate of one model. timeout: seconds that one waits for others; None: as long as it takes."""

    def __init__(self, timeout: float | None = PATIENCE):
        self.timeout = timeout
        self.calls: dict[int, RunningCall] = {}  # under way, the innermost of each thread
        self.waiting: dict[int, RunningCall] = {}  # for a change to end
        self.closed_by: ModelChange | None = None  # the change that waits for calls, or acts
        self.turn_of: ModelChange | None = None  # the change whose turn it is, from its preparation on
        self.turn, self.state_changed = RLock(), Condition()  # `state_changed`: something has begun or ended
        GATES.add(self)

    def __reduce__(self) -> tuple[type[Gate], tuple[float | None]]:
        return Gate, (self.timeout,)

    def call(self, what: str, uses: Callable[[], Names] = all_adapters) -> RunningCall:
        """Return a context: a call. uses: tells the adapters that it uses, if somebody has to know."""
        return RunningCall(self, what, uses)

    def change(self, what: str, touches: Names = None, late: bool = False) -> ModelChange:
        """Return a context: a change of these adapters (None: of all).

        late: it waits for calls when the first change within it begins, and not before.

        Raises:
            InUseError: on entering, calls or another change went on for longer than `timeout`; or this thread is in a
                call that the change would tear.
        """
        return ModelChange(self, what, touches, late)

    @property
    def is_in_call(self) -> bool:
        """True within a call of this thread."""
        return get_ident() in self.calls

    # what calls and changes do where others are under way

    def wait_for_change(self, call: RunningCall) -> None:
        """Have a call wait for the change that closed the gate."""
        with self.state_changed:
            change = self.closed_by
            if change is None or change.thread == call.thread:
                return
            del self.calls[call.thread]
            self.waiting[call.thread] = call
            self.state_changed.notify_all()
            try:
                self.state_changed.wait_for(lambda: call.thread not in self.waiting, self.timeout)
            except BaseException:
                if self.waiting.pop(call.thread, None) is None:
                    del self.calls[call.thread]
                    self.state_changed.notify_all()
                raise
            if self.waiting.pop(call.thread, None) is not None:
                raise InUseError(
                    f"{call.what} waited {self.timeout:g} s for {change.what} in thread "
                    f"'{thread_name(change.thread)}', "
                    f"while these calls run: {self.describe_calls(call.thread) or 'none'}. {REMEDY}"
                )

    def notify_change(self) -> None:
        """Tell the change that waits that a call has ended."""
        with self.state_changed:
            self.state_changed.notify_all()

    def why_no_turn(self, change: ModelChange) -> str:
        """Return the text of the error for a change that did not get its turn."""
        running_change = self.turn_of
        doing = (
            "another change"
            if running_change is None
            else f"{running_change.what} in thread '{thread_name(running_change.thread)}'"
        )
        if change.within is not None:
            return f"{change.what} within a call of the model cannot wait for {doing}: make the change between calls."
        return f"{change.what} waited {self.timeout:g} s for {doing}. {REMEDY}"

    def check_change_within_call(self, change: ModelChange, touches: Names) -> None:
        """Raise InUseError if a change within a call would tear it, or one of another thread."""
        for call in self._all_calls():
            if is_conflict(touches, call.uses()):
                is_own_call = call.thread == change.thread
                raise InUseError(
                    f"{change.what} within a call of the model would tear "
                    f"{'that call' if is_own_call else 'another call'}, "
                    f"part of which has run already: {call}. Make the change between calls. Within one, adapter_names "
                    "of a further call give rows their adapters, and a disable_adapter() block runs the base."
                )

    def _all_calls(self) -> list[RunningCall]:
        calls = []
        for call in list(self.calls.values()):
            nested: RunningCall | None = call
            while nested is not None:
                calls.append(nested)
                nested = nested.outer
        return calls

    def describe_calls(self, but: int | None = None) -> str:
        return "; ".join(str(call) for call in list(self.calls.values()) if call.thread != but)

    def reset_after_fork(self) -> None:
        """Go on in a child process, which has one thread."""
        this_thread = get_ident()
        self.calls = {thread: call for thread, call in self.calls.items() if thread == this_thread}
        self.waiting, self.state_changed = {}, Condition()
        if self.closed_by is not None and self.closed_by.thread != this_thread:
            self.closed_by = None
        if self.turn_of is None or self.turn_of.thread != this_thread:
            self.turn_of, self.turn = None, RLock()


REMEDY = (
    "Let calls end (a block of graft.calling(), or a call that waits for this thread, is one), or give the model more "
    "time with change_timeout."
)


class ForkSafeLock:
    """A lock that a child process never finds held."""

    def __init__(self) -> None:
        self.reset()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.reset)

    def reset(self) -> None:
        self.lock = RLock()


def thread_name(thread: int) -> str:
    return next((t.name for t in enumerate_threads() if t.ident == thread), str(thread))


def adapters_suffix(uses: Names) -> str:
    names = {name for name in uses or () if name != ACTIVE}
    return f" with adapters {sorted(names)}" if names else ""


GATES: WeakSet[Gate] = WeakSet()


def _reset_gates() -> None:
    for gate in list(GATES):
        gate.reset_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_gates)


def changes(touches: Callable[..., Names], late: bool = False) -> Callable[[F], F]:
    """Decorate a method as a change of its model, whose Call the object has as `call`.

    Args:
        touches: gets the method's arguments, and returns the adapters that it touches.
        late: as in `Gate.change`.
    """

    def decorate(function: F) -> F:
        @wraps(function)
        def run(self: Any, *args: object, **kwargs: object) -> Any:
            if self.call is None:  # a carrier that is in no model yet
                return function(self, *args, **kwargs)
            with self.call.gate.change(describe_call(function, args, kwargs), touches(self, *args, **kwargs), late):
                return function(self, *args, **kwargs)

        return run  # type: ignore[return-value]

    return decorate


# of a method that prepares a change of its model, such as an adapter that comes, and then makes it
prepares = changes(lambda *_, **__: (), late=True)


def describe_call(function: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]) -> str:
    """Return a call of a function for an error: with its first argument, if that is a name or names."""
    first = next(iter((*args, *kwargs.values())), None)
    return f"{function.__name__}({first!r})" if isinstance(first, (str, list)) else f"{function.__name__}()"
