# SPDX-License-Identifier: Apache-2.0
"""Write the shards of a model one after another, making each tensor just before; continue where a killed run
stopped.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from math import prod

from graft import CheckpointError
from graft.config.atomic import TEMPORARY, exchange_paths, replace_file, sync_file
from graft.config.pair import write_tensors
from graft.config.reading import LARGEST_HEADER, Json, open_file, read_object
from graft.core.errors import join_some
from graft.files.base import MODEL, list_folder_entries, matches_any
from graft.files.errors import OutputExistsError
from graft.files.merging.weights import MEASURES
from graft.files.sources import check_output, delete_folder, list_missing_folders, take_work_folder
from graft.files.tensors import BITS, Bytes

STATE, LOCK = "state.json", "lock"
METADATA = {"format": "pt"}
SPARE = 1 << 20  # bytes: for the small files


@dataclass
class Out:
    """A tensor that the output will hold.

    Attributes:
        make: returns its bytes, and its entry in the certificate, or None.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], tuple[Bytes, Json | None]]

    @property
    def nbytes(self) -> int:
        """Size of the tensor in the file, by shape and dtype."""
        return prod(self.shape) * BITS[self.dtype] // 8


def write_shard(path: str, outs: Sequence[Out]) -> tuple[str, list[Json]]:
    """Write a safetensors file, making each tensor in turn.

    Return its sha256, and its tensors' entries for the certificate.

    The file replaces an older one in one step, once it is complete.
    """
    digest, rows = hashlib.sha256(), list[Json]()

    def load(out: Out) -> Bytes:
        """Make a tensor, keep its certificate entry (if not None) with its name, and return its bytes.

        Raises AssertionError if their number is not that of shape and dtype.
        """
        data, row = out.make()
        assert len(data) == out.nbytes, out.name
        if row is not None:
            rows.append({"tensor": out.name, **row})
        return data

    parts = [(out.name, out.dtype, out.shape, BITS[out.dtype] // 8, partial(load, out)) for out in outs]
    replace_file(path, lambda to: write_tensors(to, parts, METADATA, digest.update))
    return digest.hexdigest(), rows


def sha256_of(path: str) -> str:
    """Return the sha256 of a file."""
    digest = hashlib.sha256()
    with open_file(path) as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_note(note: object, changed: Collection[str]) -> bool:
    """Return True if a state's note about a shard has the form that `Workplace.write` gives it.

    It is a dict with "sha256" and a list "rows". Each row is a dict, and its "tensor" names a tensor of `changed`. A
    row has either all measures, as floats, and no other key, or no further keys than "new" and "resized".
    """
    rows = note.get("rows") if isinstance(note, dict) and "sha256" in note else None
    return isinstance(rows, list) and all(
        isinstance(row, dict)
        and isinstance(name := row.get("tensor"), str)
        and name in changed
        and (
            row.keys() <= {"tensor", "new", "resized"}
            or (row.keys() == {"tensor", *MEASURES} and all(type(row[m]) is float for m in MEASURES))
        )
        for row in rows
    )


class Workplace:
    """A locked folder next to the output, under a name that the next run finds.

    It holds the unfinished output, a lock file, and the state: the finished shards with digests.

    Args:
        key: digest of inputs and options. Shards of another key are deleted.
    """

    def __init__(self, output: str, key: str, force: bool):
        """Compute the paths: `room` is `.NAME.graft-merge` next to the output, `folder` the output in it.

        Nothing is created.
        """
        self.output = os.path.abspath(output)
        parent, name = os.path.split(self.output)
        self.room = os.path.join(parent, f".{name}.graft-merge")
        self.folder, self.state, self.lock_file = (os.path.join(self.room, of) for of in (name, STATE, LOCK))
        self.names = [STATE, LOCK, *(f"{glob.escape(name)}/{of}" for of in ("*.safetensors", *MODEL))]
        self.key, self.force = key, force
        self.done: Json = {}
        self.parents: list[str] = []  # folders around the output that this run has made

    def check(self) -> None:
        """Raise OutputExistsError if the output exists without `force`, or is no folder with only a model's files.

        An empty folder passes.
        """
        check_output(self.output, [], self.force, model=True)

    @contextmanager
    def lock(self, shards: Collection[str], changed: Collection[str]) -> Iterator[None]:
        """Lock the folder for the block, creating it and the output's parents.

        Keep shards of a killed run with the same key.

        All other files of earlier runs are deleted. An Exception of `check` or the block deletes the folder (`clear`).
        An interrupt leaves it for the next run, and so does a block without an error.

        Args:
            shards: names of the files that will be written.
            changed: names of the tensors that may have certificate entries.

        Raises:
            OutputExistsError: the folder is a link, another user's, locked by another process, or has files that no
                merge writes. Nothing in it changes then. Or as `check`.
        """
        parent = os.path.dirname(self.output)
        self.parents = list_missing_folders(parent)
        os.makedirs(parent, exist_ok=True)
        take_work_folder(self.room)
        with suppress(FileNotFoundError):  # another process has just deleted its files
            self._check_own()
        with self._alone():
            self._check_own()  # once more, now that nobody else writes there
            try:
                self.check()
                self._take_up(shards, changed)
                yield
            except Exception:
                self.clear()
                raise

    def _check_own(self) -> None:
        """Raise OutputExistsError if the folder holds an entry that no merge writes."""
        if foreign := [name for name, is_own in self._entries() if not is_own]:
            raise OutputExistsError(
                f"{self.room}, where work in progress goes, holds {join_some(foreign, 4)}, which no merge has written. "
                "Remove it, or give another place for the result."
            )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold an exclusive lock on the lock file for the block, without waiting for it.

        The file is created with mode 600 if needed, and stays; a symbolic link is not followed. On Windows nothing is
        locked or created.

        Raises:
            OutputExistsError: another process holds the lock, or has just finished and deleted the folder or file.
        """
        try:
            import fcntl
        except ImportError:  # Windows, where nobody notices a second process
            yield
            return
        gone = OutputExistsError(f"Another process has just merged into {self.output}.")  # while this one waited
        try:
            lock = os.open(self.lock_file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
        except FileNotFoundError:
            raise gone from None
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputExistsError(
                    f"Another process is merging into {self.output} now. Wait for it, or give another folder."
                ) from None
            if not os.path.exists(self.lock_file) or not os.path.samestat(os.fstat(lock), os.stat(self.lock_file)):
                raise gone
            yield
        finally:
            os.close(lock)

    def _entries(self) -> list[tuple[str, bool]]:
        """Return the paths of the folder's entries, and for each whether a merge may have written it.

        True for plain files with a name that a merge uses, and temporary files of such.
        """
        rows = []
        for path, is_file in list_folder_entries(self.room, self.names):
            folder, name = os.path.split(path)
            temporary = TEMPORARY.fullmatch(name)
            known = os.path.join(folder, temporary["of"]) if temporary else path
            rows.append((path, is_file and matches_any(known, self.names)))
        return rows

    def _take_up(self, shards: Collection[str], changed: Collection[str]) -> None:
        """Fill `done` with the finished shards of a run with the same key, and delete all other files of the workplace
        except the lock and the state. A shard counts if it is in `shards`, its note is valid, and its SHA-256 is right.

        The key is extended by the folder's inode, so that a copied folder does not count. A missing or damaged state
        file counts as none. Without finished shards the output's folder is deleted. In all cases it is then created if
        needed.
        """
        self.key += f"-{os.stat(self.room).st_ino}"  # a folder that was copied has another number
        state: Json = {}
        with suppress(OSError, CheckpointError):
            state = read_object(self.state, LARGEST_HEADER)
        notes = state.get("shards") if state.get("key") == self.key else None
        for name, note in notes.items() if isinstance(notes, dict) else ():
            path = os.path.join(self.folder, name)
            if name in shards and is_note(note, changed) and os.path.isfile(path) and sha256_of(path) == note["sha256"]:
                self.done[name] = note
        if not self.done:
            delete_folder(self.folder)
        kept_names = {LOCK, STATE, *(os.path.join(os.path.basename(self.folder), name) for name in self.done)}
        for name, _ in self._entries():
            if name not in kept_names:
                os.remove(os.path.join(self.room, name))
        os.makedirs(self.folder, exist_ok=True)  # with the modes that the umask gives

    def check_room(self, shards: Mapping[str, Sequence[Out]]) -> None:
        """Raise OSError (ENOSPC, of the output) unless the work folder's disk has room for the tensors that are not
        written yet, and 1 MiB.
        """
        left = sum(out.nbytes for name, outs in shards.items() if name not in self.done for out in outs) + SPARE
        free = shutil.disk_usage(self.folder).free
        if left > free:
            os_error = os.strerror(errno.ENOSPC)
            raise OSError(
                errno.ENOSPC, f"{os_error}: {left / 1e9:.1f} GB are to be written, {free / 1e9:.1f} GB are free",
                self.output,
            )  # fmt: skip

    def write(self, shards: Mapping[str, Sequence[Out]], step: Callable[[str], None] | None = None) -> None:
        """Write the shards that are not done, each followed by the state file.

        Call `step` with every shard's name, done ones too.
        """
        for name, outs in shards.items():
            if name not in self.done:
                digest, rows = write_shard(os.path.join(self.folder, name), outs)
                self.done[name] = {"sha256": digest, "rows": rows}
                replace_file(self.state, json.dumps({"key": self.key, "shards": self.done}))
            if step is not None:
                step(name)

    def finish(self) -> None:
        """Move the folder to the output's path; an older output folder is exchanged with it, and then deleted by
        `clear`.

        Folder and parent are synced to the disk. Also deletes the lock and the state, even after an interrupt, once the
        output is in place. Raises as `check`.
        """
        self.check()
        sync_file(self.folder)
        folder_state = os.stat(self.folder)
        try:
            exchange_paths(self.folder, self.output) if os.path.isdir(self.output) else os.rename(
                self.folder, self.output
            )
            sync_file(os.path.dirname(self.output))
        finally:  # after an interrupt, too
            if os.path.isdir(self.output) and os.path.samestat(folder_state, os.stat(self.output)):
                self.clear()

    def clear(self) -> None:
        """Delete the unfinished output, state and lock; then the work folder and the parents that this run created, if
        empty.

        Failures to delete are ignored.
        """
        delete_folder(self.folder)
        for path in self.state, self.lock_file:
            with suppress(OSError):
                os.remove(path)
        for path in self.room, *self.parents:
            with suppress(OSError):
                os.rmdir(path)
