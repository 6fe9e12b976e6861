# SPDX-License-Identifier: Apache-2.0
"""Meetings of processes in the store of their process group: a process that is alone gets an error, and does not hang.

A process in a collective waits for ever if others do not come. So processes meet here before a step that needs them
all.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch.distributed as dist

from graft.core.errors import CheckpointError

PATIENCE = float(os.environ.get("GRAFT_PATIENCE", 30))  # seconds to wait for the other processes
LONG_PATIENCE = float(os.environ.get("GRAFT_PATIENCE", 600))  # where others may load a model or data before
WORK = timedelta(hours=1)  # the longest that the first process may take to write
GO, LEFT = b"go", b"left"


def get_store() -> dist.Store:
    """Return the key-value store of the default process group, shared by all its processes."""
    return dist.distributed_c10d._get_default_store()


class Meeting:
    """A meeting of processes at one place in the program.

    Raises:
        CheckpointError: other processes do not call this, or call it with another task.
    """

    def __init__(
        self,
        call: str,
        task: str,
        ranks: Sequence[int],
        purpose: str = "gather tensors that are spread over",
        error: type[Exception] = CheckpointError,
        patience: float | None = None,
        compares: bool = True,
    ):
        """Wait for the processes of these ranks, and compare their tasks.

        Args:
            call: the user's call, such as "save_pretrained", for errors.
            task: adapters and arguments of the call, as text. Every process must pass the same.
            purpose: the verb phrase before "<n> processes" in the error of a process that is alone.
            error: the class of errors.
            patience: seconds to wait; None: `PATIENCE`.
            compares: False: tasks may differ, and `list_ranks_with_task` tells of them.

        Raises:
            CheckpointError, or `error`: a process did not come in time, or passed another task.
        """
        self.purpose, self.error, self.compares = purpose, error, compares
        self.patience = PATIENCE if patience is None else patience
        self.call, self.store, self.rank, self.ranks = call, get_store(), dist.get_rank(), ranks
        self.room = self._wait_for_all(task)
        if compares:
            self._compare_tasks()

    def _wait_for_all(self, task: str) -> str:
        """Write `task` into the store and wait for the other ranks, at most `patience` seconds.

        Return the prefix of this meeting's keys. The last to come lets all begin. A counter in the store numbers this
        rank's meetings with these ranks; one that a process has left in vain is skipped. If `compares` is False and the
        task is not empty, it is counted under "tasks". A rank that waits in vain marks the meeting as left.

        Raises:
            CheckpointError (the class in `error`): the others did not come in time. The text names their ranks.
        """
        store, size = self.store, len(self.ranks)
        building = f"graft/{hashlib.sha256(str(list(self.ranks)).encode()).hexdigest()[:16]}"
        while True:
            room = f"{building}/{store.add(f'{building}/rank {self.rank}', 1)}"
            go = f"{room}/go"
            if not store.check([go]):
                break  # else a process has waited here in vain and left
        store.set(f"{room}/{self.rank}", task)
        if task and not self.compares:
            store.add(f"{room}/tasks", 1)
        if store.add(f"{room}/count", 1) == size:
            store.compare_set(go, "", GO.decode())
        try:
            store.wait([go], timedelta(seconds=self.patience))
            answer = bytes(store.get(go))
        except RuntimeError:
            answer = bytes(store.compare_set(go, "", LEFT.decode()))
        if answer != GO:
            missing = [rank for rank in self.ranks if not store.check([f"{room}/{rank}"])]
            who = f"rank {self.rank} waited {self.patience:g} s for {missing or 'the others'}"
            raise self.error(
                f"{self.call} has to {self.purpose} {size} processes, and this one is alone "
                f"({who}). Call {self.call} on all processes."
            )
        return room

    def _compare_tasks(self) -> None:
        """Raise `error` if another rank wrote another task.

        The text shows this rank's and the first other one, and all differing ranks.
        """
        tasks = {rank: bytes(self.store.get(f"{self.room}/{rank}")) for rank in self.ranks}
        differing_ranks = [rank for rank, task in tasks.items() if task != tasks[self.rank]]
        if differing_ranks:
            raise self.error(
                f"{self.call} was called with adapters that are not the same on all processes: rank {self.rank} has "
                f"{tasks[self.rank].decode()}, rank {differing_ranks[0]} has {tasks[differing_ranks[0]].decode()} "
                f"(differing ranks: {differing_ranks}). "
                "Give all processes the same adapters, names and arguments."
            )

    def list_ranks_with_task(self) -> list[int]:
        """Return the ranks that came with a text that is not empty, of a meeting that does not compare texts.

        One read of the store if there is none.
        """
        if not self.store.add(f"{self.room}/tasks", 0):
            return []
        return [rank for rank in self.ranks if bytes(self.store.get(f"{self.room}/{rank}"))]

    def clear(self) -> None:
        """Delete the meeting's keys from the store: its own, and as the first process the common ones.

        Call this after a later meeting of the same processes, when nobody reads them any more.
        """
        common = ("go", "count", "tasks") if self.rank == self.ranks[0] else ()
        for name in (str(self.rank), *common):
            self.store.delete_key(f"{self.room}/{name}")

    def run_on_first(self, act: Callable[[], object]) -> None:
        """Call `act` on the first rank.

        The others wait up to an hour (`WORK`) until it is done; then torch's error of the store is raised. An error of
        `act` is raised on all.
        """
        done = f"{self.room}/done"
        if self.rank != self.ranks[0]:
            self.store.wait([done], WORK)
            error = pickle.loads(self.store.get(done))
            if error is not None:
                raise error
            return
        try:
            act()
        except BaseException as e:
            leave_error(self.store, done, e)
            raise
        leave_error(self.store, done, None)


def leave_error(shelf: dist.Store, key: str, error: BaseException | None) -> None:
    """Write an error, or None, pickled into the store under `key`."""
    shelf.set(key, pickle_error(error))  # type: ignore[arg-type]  # bytes do, too


def pickle_error(error: BaseException | None) -> bytes:
    """Return an error, or None, pickled.

    An error that cannot be pickled and read again becomes a CheckpointError: "Rank 0 could not write: ", its type and
    text.
    """
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:
        data = pickle.dumps(CheckpointError(f"Rank 0 could not write: {type(error).__name__}: {error}"))
    return data
