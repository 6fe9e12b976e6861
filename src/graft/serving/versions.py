# SPDX-License-Identifier: Apache-2.0
"""Versions of an adapter on a server that goes on answering while a policy trains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Lock, RLock

from graft.core.errors import AdapterNotFoundError, ConfigError, PeftWarning, warn
from graft.model.adapter_tensors import AdapterTensors


class Versions:
    """The versions of one adapter that a server holds: each under its own name, which is never used again.

    A server keeps what it computed by name, so that a version which takes the name of another answers with the keys and
    values of that. A new version is loaded before an old one goes, and counts from when the load has returned: requests
    never meet a name that the server does not have. Between the two the server holds keep + 1 of them.

        versions = Versions("policy", load, unload, keep=2)
        name = versions.publish(graft.adapter_tensors(model, layout="vllm"))  # "policy-v1-3f9c"
        with versions.using() as name:
            completions = ask(name, prompts)

    Any number of threads may use versions while one publishes.

    Args:
        name: the beginning of their names.
        load: takes a name and the tensors, and returns when all replicas of the server have them.
        unload: takes a name, which no replica has when it returns.
        keep: how many versions stay, the current one included: staleness + 1.

    Raises:
        ConfigError: `keep` is below 1.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[str, AdapterTensors], object],
        unload: Callable[[str], object],
        keep: int = 1,
    ):
        if keep < 1:
            raise ConfigError(f"keep={keep}: the current version stays, so that it is 1 at least.")
        self.name, self.load, self.unload, self.keep = name, load, unload, keep
        self.number = 0  # of the last version that was tried
        self.names: list[str] = []  # of the versions on the server, the current one last
        self._used: Counter[str] = Counter()
        self._publishing, self._lock = Lock(), RLock()

    @property
    def current(self) -> str | None:
        """The name of the newest version; None before the first."""
        return self.names[-1] if self.names else None

    def publish(self, tensors: AdapterTensors) -> str:
        """Load a version, make it the current one, and unload what `keep` leaves out and nobody uses; return its name.

        Raises:
            ConfigError: there are no tensors: this process is not the first of those that hold the adapter.
            Whatever `load` raises: the version is taken off the server again, and the current one stays.
        """
        if not tensors.tensors:
            raise ConfigError(f"There are no tensors to publish as '{self.name}': the first process has them.")
        with self._publishing:
            self.number += 1
            name = f"{self.name}-v{self.number}-{tensors.digest[:4]}"
            try:
                self.load(name, tensors)
            except BaseException:
                with suppress(Exception):  # it may not be there
                    self.unload(name)
                raise
            with self._lock:
                self.names.append(name)
            self._drop()
            return name

    @contextmanager
    def using(self, name: str | None = None) -> Iterator[str]:
        """Keep a version on the server within the block; yield its name.

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
            self._drop()

    def _drop(self) -> None:
        """Unload the versions that are old and not in use; those that cannot be stay in `names`, for the next time."""
        with self._lock:
            old = [name for name in self.names[: -self.keep] if not self._used[name]]
            self.names = [name for name in self.names if name not in old]
        for name in old:
            try:
                self.unload(name)
            except Exception as e:
                with self._lock:
                    self.names.insert(0, name)
                warn(f"Version '{name}' could not be unloaded, and takes a place on the server: {e!r}", PeftWarning)

    def state_dict(self) -> dict[str, int]:
        """Return what a resumed training needs, so that no name comes again."""
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on with the numbers of a training that was interrupted.

        Raises:
            ConfigError: versions have been published since.
        """
        if self.number > state["number"]:
            raise ConfigError(f"'{self.name}' is at version {self.number} already, behind which {state} would go back.")
        self.number = state["number"]
