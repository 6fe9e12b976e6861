# SPDX-License-Identifier: Apache-2.0
# Supported inside: rooms may import this module.
"""The gate of a model: calls pass it concurrently, a change passes alone.

A call therefore sees one state of the model from its beginning to its end.

- A call (forward, `generate`, a request of slots) passes by `Gate.call`. A change (of the active or merged adapters, or
    of adapter tensors) passes by `Gate.change`. A change waits until all running calls have ended. New calls wait for
    the change. All calls that waited for one change run before the next change, so that neither kind waits forever.
- Calls within a call or a change of the same thread pass at once, and so do parts of a change. A change within a call
    cannot wait for that call: it runs if it touches no adapter that a running call uses, and gets an error otherwise.
- A late change (`Gate.change(…, late=True)`, `prepares`) has a first part that runs next to calls. Other changes wait
    from its beginning on, calls only from the first `change` within it on.
- A call that finds the gate open takes no lock. It registers itself and then looks for a change; a change registers
    itself and then looks for calls. At least one of the two sees the other.
- All state is by thread. Layers that a backward pass runs again in autograd's threads are in no call, and compiled code
    passes without the gate. Copies and child processes begin with an open gate.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from functools import wraps
from threading import Condition, RLock, get_ident
from threading import enumerate as enumerate_threads
from typing import Any, TypeVar
from weakref import WeakSet

from graft.core.errors import InUseError

PATIENCE = 300.0  # seconds that a change waits for calls, and a call for a change: the default
ACTIVE = ""  # a name that calls use and changes touch: the list of active adapters
F = TypeVar("F", bound=Callable[..., object])
Names = Collection[str] | None  # None: all, and the base


def is_conflict(touches: Names, uses: Names) -> bool:
    """Return True if a change of the adapters `touches` changes the result of a call that uses the adapters `uses`.

    None means all adapters and the base. A change of all conflicts with every call; a call of all conflicts with every
    change that touches something.
    """
    if touches is None:
        return True
    return bool(touches) if uses is None else any(name in uses for name in touches)


def all_adapters(*_: object, **__: object) -> Names:
    """Return None, which means all adapters and the base, for any arguments."""
    return None


def adapters_of_deletion(adapter: str, active: Collection[str]) -> Names:
    """Return the names that a deletion of an adapter touches: the adapter, and ACTIVE if it is among `active`."""
    return (adapter, ACTIVE) if adapter in active else (adapter,)


class RunningCall:
    """A call that passes the gate, as a context manager."""

    __slots__ = ("gate", "outer", "thread", "uses", "what")

    def __init__(self, gate: Gate, what: str, uses: Callable[[], Names]):
        self.gate, self.what, self.uses = gate, what, uses

    def __enter__(self) -> RunningCall:
        """Register the call as the innermost of its thread, and keep the call around it as `outer`, or None.

        If the gate is closed, wait for the change (`Gate.wait_for_change`), unless this call is within another.
        """
        gate = self.gate
        calls = gate.calls
        self.thread = thread = get_ident()
        self.outer: RunningCall | None = calls.get(thread)
        calls[thread] = self  # register before looking for a change
        if gate.closed_by is not None and self.outer is None:
            gate.wait_for_change(self)
        return self

    def __exit__(self, *_: object) -> None:
        """Register the outer call of the thread again, or none. If a change has closed the gate, wake it."""
        gate = self.gate
        if self.outer is None:
            gate.calls.pop(self.thread, None)
        else:
            gate.calls[self.thread] = self.outer
        if gate.closed_by is not None:
            with gate.state_changed:
                gate.state_changed.notify_all()

    def __str__(self) -> str:
        """Return the call with its adapters and thread, for errors."""
        return f"{self.what}{adapters_suffix(self.uses())} in thread '{thread_name(self.thread)}'"


class ModelChange:
    """A change of the model that passes the gate, or a part of one, as a context manager."""

    __slots__ = ("before", "closed", "gate", "late", "thread", "touches", "what", "whole", "within")

    def __init__(self, gate: Gate, what: str, touches: Names, late: bool):
        """Keep the change's name, the adapters that it touches, and `late`: the gate stays open until `close_gate`."""
        self.gate, self.what, self.touches, self.late = gate, what, touches, late
        self.closed = False
        self.before: tuple[ModelChange | None, ModelChange | None] = (None, None)

    def __enter__(self) -> ModelChange:
        """Take the gate's turn, and close the gate unless the change is late. Return this change.

        Sets `thread`, `within` (the thread's running call or None), `whole`, `before`, and the gate's `turn_of`. After
        an error in closing, the turn is given back.

        Within a change of the same thread, and in the same call or none, this is a part of that change: `whole` is that
        one, and the turn is not taken. It then only closes the gate, if the outer change has not closed it and this one
        is not late.

        Within a call, `check_change_within_call` comes first, and then the turn must be free at once.

        Raises:
            InUseError: the turn of another change lasts longer than the gate's timeout; or see `close_gate`.
        """
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
            got = gate.turn.acquire(blocking=False)  # no wait: another change may wait for this thread's call
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
        """Open the gate, if this change has closed it; set `turn_of` back, and give the turn back.

        A part of a change does nothing.

        Errors of the block pass on.
        """
        if self.whole is None:
            if self.closed:
                self.open_gate()
            self.gate.turn_of = self.before[0]
            self.gate.turn.release()

    def close_gate(self, touches: Names = ()) -> None:
        """Close the gate: new calls wait. Then wait until no call is running.

        A part of a change calls `close_gate` of the whole change, and returns. A change that has closed the gate
        already returns, too.

        A change within a call first checks that no running call uses a touched adapter. Then it closes the gate as
        well, and only does not wait.

        Args:
            touches: names of the adapters that the change touches, for that check.

        Raises:
            InUseError: calls ran for longer than the gate's timeout; the gate is open again. Or this thread is in a
                call, and a running call uses an adapter that the change touches; then the gate was not closed.
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
            gate.closed_by = self  # register before looking for calls
            ended = self.within is not None or not gate.calls
            try:
                ended = ended or gate.state_changed.wait_for(lambda: not gate.calls, gate.timeout)
            finally:
                if not ended:
                    running = gate.describe_calls()
                    self.open_gate()
        if not ended:
            raise InUseError(
                f"{self.what} changed nothing, since it waited {gate.timeout:g} s for calls of the model that still "
                f"run: {running}. {REMEDY}"
            )
        self.closed = True

    def open_gate(self) -> None:
        """Set `closed_by` of the gate to its value from before this change: that is open, unless an outer change keeps
        it closed.

        If it is open, the waiting calls are registered as running, before another change can close the gate, and wake.
        """
        gate = self.gate
        with gate.state_changed:
            gate.closed_by = self.before[1]
            if gate.closed_by is None:
                gate.calls.update(gate.waiting)
                gate.waiting.clear()
                gate.state_changed.notify_all()


class Gate:
    """The gate of one model.

    timeout: seconds that calls and changes wait for each other; None: without end.
    """

    def __init__(self, timeout: float | None = PATIENCE):
        """Make an open gate without calls or changes, and list it among those to reset after a fork."""
        self.timeout = timeout
        self.calls: dict[int, RunningCall] = {}  # running: the innermost call of each thread
        self.waiting: dict[int, RunningCall] = {}  # calls that wait for a change to end, by thread
        self.closed_by: ModelChange | None = None  # the change that waits for calls, or runs
        self.turn_of: ModelChange | None = None  # the change that has the turn, from its preparation on
        self.turn, self.state_changed = RLock(), Condition()  # `state_changed`: something has begun or ended
        FORK_SAFE.add(self)

    def __reduce__(self) -> tuple[type[Gate], tuple[float | None]]:
        """Return a pickle that makes an open gate with the same timeout."""
        return Gate, (self.timeout,)

    def call(self, what: str, uses: Callable[[], Names] = all_adapters) -> RunningCall:
        """Return a context manager: a call. Errors contain its name, the first argument.

        uses: returns the adapters that the call uses (None: all); called only when a change within a call or an error
        needs them.
        """
        return RunningCall(self, what, uses)

    def change(self, what: str, touches: Names = None, late: bool = False) -> ModelChange:
        """Return a context manager: a change of the adapters `touches` (None: all and the base).

        Errors contain its name, the first argument.

        late: the change waits for calls only when the first change within it begins.

        Raises:
            InUseError: on entering, calls or another change lasted longer than `timeout`. Or this thread is in a call,
                and a running call uses an adapter of `touches`.
        """
        return ModelChange(self, what, touches, late)

    @property
    def is_in_call(self) -> bool:
        """True if this thread is in a call."""
        return get_ident() in self.calls

    # calls and changes that meet

    def wait_for_change(self, call: RunningCall) -> None:
        """Block a call until the change that closed the gate ends.

        Returns at once if no change has, or if it is a change of this thread.

        The call is not registered as running while it waits, which wakes the change; the end of the change registers it
        again. If the wait fails or times out, the call is registered nowhere.

        Raises:
            InUseError: the change lasted longer than the gate's timeout. The text names the change and the running
                calls.
        """
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

    def why_no_turn(self, change: ModelChange) -> str:
        """Return the text of the error for a change that did not get its turn: within a call, or after the timeout."""
        running_change = self.turn_of
        doing = "another change"
        if running_change is not None:
            doing = f"{running_change.what} in thread '{thread_name(running_change.thread)}'"
        if change.within is not None:
            return f"{change.what} within a call of the model cannot wait for {doing}. Make the change between calls."
        return f"{change.what} waited {self.timeout:g} s for {doing}. {REMEDY}"

    def check_change_within_call(self, change: ModelChange, touches: Names) -> None:
        """Raise InUseError if a change within a call touches an adapter that a running call, of this or another thread,
        uses. The text names the first such call.
        """
        for call in self._all_calls():
            if is_conflict(touches, call.uses()):
                is_own_call = call.thread == change.thread
                raise InUseError(
                    f"{change.what} within a call of the model would tear "
                    f"{'that call' if is_own_call else 'another call'}, "
                    f"which has partly run already: {call}. Make the change between calls, or use adapter_names of "
                    "further calls and disable_adapter() blocks."
                )

    def _all_calls(self) -> Iterator[RunningCall]:
        """Return the running calls of all threads: of each thread the innermost first, then the calls around it."""
        for call in list(self.calls.values()):
            nested: RunningCall | None = call
            while nested is not None:
                yield nested
                nested = nested.outer

    def describe_calls(self, but: int | None = None) -> str:
        """Return the innermost running call of each thread as a text, separated by "; ". "" if none runs.

        but: the identifier of a thread to leave out.
        """
        return "; ".join(str(call) for call in list(self.calls.values()) if call.thread != but)

    def reset_after_fork(self) -> None:
        """Reset the gate in a child process, where only the present thread exists.

        Calls, changes and locks of other threads are dropped; those of this thread stay. No call waits, and the
        condition is new.
        """
        this_thread = get_ident()
        self.calls = {thread: call for thread, call in self.calls.items() if thread == this_thread}
        self.waiting, self.state_changed = {}, Condition()
        if self.closed_by is not None and self.closed_by.thread != this_thread:
            self.closed_by = None
        if self.turn_of is None or self.turn_of.thread != this_thread:
            self.turn_of, self.turn = None, RLock()


REMEDY = (
    "Let calls and blocks of graft.calling() end, also those that wait for this thread, or give the model more time "
    "with change_timeout."
)


class ForkSafeLock:
    """A reentrant lock as `lock`, which is always free at the beginning of a child process."""

    def __init__(self) -> None:
        """Make the lock, and register it for a reset in forked child processes."""
        self.reset_after_fork()
        FORK_SAFE.add(self)

    def reset_after_fork(self) -> None:
        """Replace `lock` by a new, free one."""
        self.lock = RLock()


def thread_name(thread: int) -> str:
    """Return the name of the thread with this identifier; the identifier as text if the thread has ended."""
    return next((t.name for t in enumerate_threads() if t.ident == thread), str(thread))


def adapters_suffix(uses: Names) -> str:
    """Return " with adapters [names]", sorted and without ACTIVE, for an error; "" if no name is left, or for None
    (all).
    """
    names = {name for name in uses or () if name != ACTIVE}
    return f" with adapters {sorted(names)}" if names else ""


FORK_SAFE: WeakSet[Gate | ForkSafeLock] = WeakSet()  # objects to reset in forked child processes


def _reset_all() -> None:
    """Reset all gates and locks of this process after a fork."""
    for part in list(FORK_SAFE):
        part.reset_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_all)


def changes(touches: Callable[..., Names], late: bool = False) -> Callable[[F], F]:
    """Return a decorator of methods: each call runs as a change of the object's model, by the gate of `self.call`.

    Without a `call` (a carrier outside any model) the method just runs. Errors name the method and its first argument.

    Args:
        touches: gets self and the method's arguments, and returns the adapters that the change touches.
        late: as in `Gate.change`.
    """

    def decorate(function: F) -> F:
        """Return the method wrapped as a change: each call takes the gate of the model for its time.

        The change's name is a description of the call; `touches(self, *args, **kwargs)` gives the adapters.
        """

        @wraps(function)
        def run(self: Any, *args: object, **kwargs: object) -> Any:
            """Run the method within a change of the model, and return its result; without a change if `self.call` is
            None.

            Raises InUseError if the gate cannot be taken.
            """
            if self.call is None:  # a carrier outside any model
                return function(self, *args, **kwargs)
            with self.call.gate.change(describe_call(function, args, kwargs), touches(self, *args, **kwargs), late):
                return function(self, *args, **kwargs)

        return run  # type: ignore[return-value]

    return decorate


# decorates a method that first prepares a change (the load of an adapter), and then makes it
prepares = changes(lambda *_, **__: (), late=True)


def describe_call(function: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]) -> str:
    """Return "name(first argument)" of a call for an error; "name()" if that argument is no string or list.

    Without positional arguments the first keyword's value counts.
    """
    first = next(iter((*args, *kwargs.values())), None)
    return f"{function.__name__}({first!r})" if isinstance(first, (str, list)) else f"{function.__name__}()"
