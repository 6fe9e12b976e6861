# SPDX-License-Identifier: Apache-2.0
"""Versions of an adapter on a server that answers while a policy trains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError, wait
from contextlib import contextmanager, suppress
from threading import Lock, RLock, Thread

from graft import AdapterNotFoundError, AdapterTensors, ConfigError, PeftWarning, ServerTimeoutError, UnknownModelError
from graft.core.errors import warn


class Versions:
    """The versions of one adapter on a server: each under a name that is never used again.

    A server caches results by name, so that a version with an old name would answer with old keys and values. A new
    version is loaded before an old one is removed, and is current once the load has returned: requests never meet a
    name that the server lacks. Between the two the server holds keep + 1 of them.

        versions = Versions("policy", load, unload, keep=2)
        name = versions.publish(graft.adapter_tensors(model, layout="vllm"))  # "policy-v1-3f9c"
        with versions.using() as name:
            completions = ask(name, prompts)

    Any number of threads may use versions while one publishes.

    Args:
        name: the beginning of their names.
        load: takes a name and the tensors, and returns when all replicas of the server have them.
        unload: takes a name, which no replica has when it returns. If none had it, it returns, or raises
            AdapterNotFoundError or UnknownModelError.
        keep: how many versions stay, the current one included: staleness + 1.
        timeout: seconds that a load or an unload may take; None: without limit.

    Attributes:
        names: of the versions on the server, the current one last.
        leftovers: names of versions that failed to load and could not be unloaded: each `publish` tries it again.

    Raises:
        ConfigError: `keep` is below 1, or `timeout` is not positive.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[str, AdapterTensors], object],
        unload: Callable[[str], object],
        keep: int = 1,
        timeout: float | None = None,
    ):
        """Check and note the arguments.

        The server is not called. The number of the last version is 0, and there are no versions.

        Raises:
            ConfigError: `keep` is below 1, or `timeout` is not above 0; None waits without a limit.
        """
        if keep < 1:
            raise ConfigError(f"keep={keep} is too small, since the current version stays. Pass 1 or more.")
        if timeout is not None and timeout <= 0:
            raise ConfigError(f"timeout={timeout} is invalid. Pass seconds above 0, or None.")
        self.name, self.load, self.unload, self.keep, self.timeout = name, load, unload, keep, timeout
        self.number = 0  # of the last version that was tried
        self.names: list[str] = []
        self.leftovers: list[str] = []
        self._used: Counter[str] = Counter()
        self._publishing, self._lock = Lock(), RLock()

    @property
    def current(self) -> str | None:
        """The name of the newest version; None before the first."""
        return self.names[-1] if self.names else None

    def publish(self, tensors: AdapterTensors) -> str:
        """Load a version, make it the current one, and unload older ones beyond `keep` that nobody uses.

        Return its name: `name`-v<number>-<four digits of the tensors' digest>.

        One publishes at a time. The number rises before the load, so that a failed one is not used again. Leftovers are
        unloaded first. Warns of each version that cannot be unloaded.

        Raises:
            ConfigError: there are no tensors: this process is not the first of those that hold the adapter.
            ServerTimeoutError: the load took longer than `timeout`, or raised a TimeoutError.
            Any other error of `load`. After any of these the version is unloaded again, as soon as the load has ended,
                and the current one stays. A warning tells if it cannot be unloaded.
        """
        if not tensors.tensors:
            raise ConfigError(f"There are no tensors to publish as '{self.name}'. Call this in the first process.")
        with self._publishing:
            self.number += 1
            name = f"{self.name}-v{self.number}-{tensors.digest[:4]}"
            with self._lock:
                leftovers, self.leftovers = self.leftovers, []
            self._unload(leftovers, self.leftovers)  # first, since each takes a place
            self._run_within_timeout(lambda: self.load(name, tensors), f"load version '{name}'", name)
            with self._lock:
                self.names.append(name)
                old = self._take_unused(self.names[: -self.keep])
            self._unload(old, self.names)
            return name

    def _run_within_timeout(self, run: Callable[[], object], what: str, name: str = "") -> None:
        """Call the server by `run`, in a new daemon thread for `timeout` seconds at most, or without a limit in this
        thread if `timeout` is None.

        If that fails or is late and `name` is not empty, version `name` is unloaded: at once, or by the late thread
        when it ends. A version that cannot be unloaded is added to `leftovers`. An interrupt of the wait counts as late
        and is raised.

        Raises:
            ServerTimeoutError: it was late, or raised a TimeoutError. Any other error of `run` is raised as it is.
        """
        answer: Future[None] = Future()

        def call_server() -> None:
            """Run the call, and end `answer` with its error, or with None. Nothing is raised.

            If `answer` is cancelled, so that the call is late, unload version `name`, unless that is empty. If that
            fails, add it to `leftovers`.
            """
            error = None
            try:
                run()
            except BaseException as e:
                error = e
            try:
                answer.set_exception(error)
            except InvalidStateError:
                try:
                    if name:
                        self._ask_to_unload(name)
                except Exception:
                    with self._lock:
                        self.leftovers.append(name)  # the next `publish` tells

        if self.timeout is None:
            call_server()
        else:
            Thread(target=call_server, daemon=True).start()
            try:
                wait([answer], self.timeout)
            finally:
                answer.cancel()  # one that has ended stays as it is
        if answer.cancelled():
            raise ServerTimeoutError(
                f"The server did not {what} within {self.timeout} s; a late success is undone. Look at the server, or "
                "raise `timeout`."
            )
        if (e := answer.exception()) is None:
            return
        if name:
            self._unload([name], self.leftovers)
        if isinstance(e, TimeoutError):
            raise ServerTimeoutError(f"The server did not {what} in time: {e!r}.") from e
        raise e

    @contextmanager
    def using(self, name: str | None = None) -> Iterator[str]:
        """Keep a version on the server within the block; yield its name.

        Afterwards it is unloaded if it is beyond `keep` and nobody else uses it.

        Args:
            name: of the version; the current one if None.

        Raises:
            AdapterNotFoundError: the server does not have it any more, or none yet.
        """
        with self._lock:
            name = self.current if name is None else name
            if name is None or name not in self.names:
                raise AdapterNotFoundError(f"The server has no version {name!r} of '{self.name}', but {self.names}.")
            self._used[name] += 1
        try:
            yield name
        finally:
            with self._lock:
                self._used[name] -= 1
                old = self._take_unused([name] if name in self.names[: -self.keep] else [])
            self._unload(old, self.names)

    def _take_unused(self, names: list[str]) -> list[str]:
        """Remove from `self.names` those of `names` that are not in use, and return them. The caller holds the lock."""
        free = [name for name in names if not self._used[name]]
        self.names[:] = [name for name in self.names if name not in free]
        return free

    def _unload(self, names: list[str], names_kept: list[str]) -> None:
        """Unload versions one after the other, each within `timeout`, and in a thread if there is one.

        A failure gives a PeftWarning and does not end the loop; the name goes to the front of `names_kept`, for the
        next time.
        """
        for name in names:
            try:
                self._run_within_timeout(lambda name=name: self._ask_to_unload(name), f"unload version '{name}'")  # type: ignore[misc]
            except Exception as e:
                with self._lock:
                    names_kept.insert(0, name)
                warn(
                    f"Version '{name}' could not be unloaded, and takes a place on the server: {e!r}. The next "
                    "publish() tries it again.",
                    PeftWarning,
                )

    def _ask_to_unload(self, name: str) -> None:
        """Call `unload`. Errors that say that the server lacks the version are ignored."""
        with suppress(AdapterNotFoundError, UnknownModelError):
            self.unload(name)

    def state_dict(self) -> dict[str, int]:
        """Return {"number": the number of the last version}, also of one that failed to load, so that a resumed
        training uses no name again.
        """
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue with the numbers of a training that was interrupted.

        Raises:
            ConfigError: this object has published more versions already.
        """
        if self.number > state["number"]:
            raise ConfigError(f"'{self.name}' is at version {self.number}, and {state} is earlier. Load it first.")
        self.number = state["number"]
