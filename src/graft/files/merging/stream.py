# SPDX-License-Identifier: Apache-2.0
"""Write the shards of a model one after another, each tensor when it is its turn; go on where a killed run stopped."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod

from graft.config.atomic import exchange, replace, sync, write_text
from graft.config.notes import header
from graft.config.reading import Json
from graft.files.errors import OutputExistsError
from graft.files.output import is_adapter
from graft.files.tensors import BITS, Bytes

STATE = ".graft-merge"
METADATA = {"format": "pt"}
SPARE = 1 << 20  # bytes: for the small files


@dataclass
class Out:
    """A tensor that the output will hold.

    Attributes:
        make: returns its bytes, and what a certificate says of it, if anything.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], tuple[Bytes, Json | None]]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * BITS[self.dtype] // 8


def write_shard(path: str, outs: Sequence[Out]) -> tuple[str, list[Json]]:
    """Write a safetensors file; return its sha256, and what there is to say of its tensors."""
    order = sorted(outs, key=lambda out: (-BITS[out.dtype], out.name))  # the widest first, so that all are aligned
    head = header(((out.name, out.dtype, out.shape, out.nbytes) for out in order), METADATA)
    digest, rows = hashlib.sha256(head), list[Json]()
    part = f"{path}.part"
    with open(part, "wb") as f:
        f.write(head)
        for out in order:
            data, row = out.make()
            assert len(data) == out.nbytes, out.name
            f.write(data)
            digest.update(data)
            del data
            if row is not None:
                rows.append({"tensor": out.name, **row})
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)
    return digest.hexdigest(), rows


class Workplace:
    """The folder in which an output comes about: beside it, under a name that the next run finds.

    Args:
        key: of inputs and options. What another key has left there is deleted.
    """

    def __init__(self, output: str, key: str, force: bool):
        self.output = os.path.abspath(output)
        parent, name = os.path.split(self.output)
        self.folder = os.path.join(parent, f".{name}.graft-merge")
        self.key, self.force = key, force
        self.done: Json = {}

    def check(self) -> None:
        """Raise OutputExistsError if something stands where the output goes."""
        if os.path.lexists(self.output) and not self.force:
            raise OutputExistsError(f"{self.output} exists: --force replaces it.")
        if os.path.lexists(self.output) and (os.path.islink(self.output) or not os.path.isdir(self.output)):
            raise OutputExistsError(f"{self.output} is a link or no folder, and stays as it is.")
        known = os.path.isfile(os.path.join(self.output, "config.json"))
        if os.path.isdir(self.output) and os.listdir(self.output) and not known and not is_adapter(self.output):
            raise OutputExistsError(
                f"{self.output} holds neither a model nor an adapter, and stays as it is: remove it yourself."
            )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Have the folder alone; take up what a killed run of the same key has finished."""
        os.makedirs(self.folder, exist_ok=True)
        lock = os.open(os.path.join(self.folder, ".lock"), os.O_RDWR | os.O_CREAT)
        try:
            with suppress(ImportError):  # not on Windows
                import fcntl

                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    raise OutputExistsError(f"Another process is merging into {self.output} now.") from None
            if not os.path.exists(os.path.join(self.folder, ".lock")):  # it had the lock while this one waited
                raise OutputExistsError(f"Another process has just merged into {self.output}.")
            try:
                self.check()  # once more, now that nobody else writes it
            except OutputExistsError:
                shutil.rmtree(self.folder, ignore_errors=True)
                raise
            self.done = self._left()
            yield
        finally:
            os.close(lock)

    def _left(self) -> Json:
        path = os.path.join(self.folder, STATE)
        with suppress(OSError, ValueError, KeyError, TypeError), open(path, encoding="utf-8") as f:
            state = json.load(f)
            if state["key"] == self.key:
                return {name: shard for name, shard in state["shards"].items() if os.path.exists(self.at(name))}
        for name in os.listdir(self.folder):
            if name != ".lock":
                there = os.path.join(self.folder, name)
                shutil.rmtree(there) if os.path.isdir(there) and not os.path.islink(there) else os.remove(there)
        return {}

    def at(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def check_room(self, shards: Mapping[str, Sequence[Out]]) -> None:
        """Raise OSError (ENOSPC) unless the disk has room for what is not written yet."""
        left = sum(out.nbytes for name, outs in shards.items() if name not in self.done for out in outs) + SPARE
        free = shutil.disk_usage(self.folder).free
        if left > free:
            os_error = os.strerror(errno.ENOSPC)
            raise OSError(
                errno.ENOSPC, f"{os_error}: {left / 1e9:.1f} GB are to be written, {free / 1e9:.1f} GB are free",
                self.output,
            )  # fmt: skip

    def write(self, shards: Mapping[str, Sequence[Out]], step: Callable[[str], None] | None = None) -> None:
        for name, outs in shards.items():
            if name not in self.done:
                digest, rows = write_shard(self.at(name), outs)
                self.done[name] = {"sha256": digest, "rows": rows}
                state = json.dumps({"key": self.key, "shards": self.done})
                replace(self.at(STATE), write_text(state))
            if step is not None:
                step(name)

    def finish(self) -> None:
        """Put the folder where the output goes; what stands there gets its name, and is deleted."""
        with suppress(FileNotFoundError):
            os.remove(self.at(STATE))
        sync(self.folder)
        try:
            exchange(self.folder, self.output) if os.path.isdir(self.output) else os.rename(self.folder, self.output)
            sync(os.path.dirname(self.output))
        finally:  # after an interrupt, too: the lock is in the folder that has come, or nothing has
            if os.path.exists(lock := os.path.join(self.output, ".lock")):
                os.remove(lock)
                shutil.rmtree(self.folder, ignore_errors=True)
