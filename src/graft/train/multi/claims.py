# SPDX-License-Identifier: Apache-2.0
"""Names in a folder that one process alone writes: locks on bytes of a file there, which end when the process does,
however that ends."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import weakref
from collections import Counter
from collections.abc import Iterable

from graft.core.errors import FolderInUseError, PeftWarning, warn

FILE = ".lock"  # it stays, empty
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # what file systems without locks say
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)

Place = tuple[int, int]  # of a file: device and number
Lock = tuple[Place, int]  # of a byte in it
_files: dict[Place, int] = {}  # descriptors: closing any would end all locks that the process has on its file
_holders: Counter[Lock] = Counter()  # how many Claims of this process share a lock
_guard = threading.RLock()


def _forget() -> None:
    """Begin anew in a process that was forked, to which no lock of its parent belongs."""
    global _guard
    _guard = threading.RLock()
    _files.clear()
    _holders.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


class Claims:
    """What this process alone writes in folders, until somebody releases it, or it is collected, or the process ends.

    Several in one process may hold the same.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[str, str], Lock] = {}  # by folder and name
        weakref.finalize(self, _release, self._held)

    def take(self, folder: str, names: Iterable[str], alone: bool = False) -> None:
        """Claim names in a folder, all or none of them. Where nothing can be written, there is nothing to claim.

        Args:
            alone: refuse what others in this process hold, too.

        Raises:
            FolderInUseError: another process holds one of them.
        """
        new: dict[tuple[str, str], Lock] = {}
        with _guard:
            try:
                for name in names:
                    if (folder, name) not in self._held:
                        lock = _lock(folder, name, alone)
                        if lock is None:
                            break
                        new[folder, name] = lock
            except BaseException:
                _release(new)
                raise
            self._held |= new

    def release(self, name: str | None = None) -> None:
        """Let others claim a name, in any folder; None: all that is held."""
        _release(self._held, name)


def _lock(folder: str, name: str, alone: bool) -> Lock | None:
    """Lock the byte of a name; None if nobody can write there, or files have no locks."""
    try:
        place = _file_in(folder)
    except OSError as error:
        if error.errno in READ_ONLY:
            return None
        raise
    lock = place, int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    if _holders[lock]:
        if alone:
            raise _refusal(folder, name, "This process")
    else:
        try:
            import fcntl  # not on Windows

            fcntl.lockf(_files[place], fcntl.LOCK_EX | fcntl.LOCK_NB, 1, lock[1])
        except (ImportError, OSError) as error:
            _close_unused(place)
            if isinstance(error, (BlockingIOError, PermissionError)):
                raise _refusal(folder, name, "Another process") from None
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                raise
            warn(
                f"{folder} is on a system whose files have no locks ({error}): nobody notices if two processes write "
                "there at once. Let one at a time do so.",
                PeftWarning,
            )
            return None
    _holders[lock] += 1
    return lock


def _file_in(folder: str) -> Place:
    """Open the file of a folder, unless it is open."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, FILE)
    if os.path.exists(path) and (place := _place(os.stat(path))) in _files:
        return place
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    place = _place(os.fstat(fd))
    _files[place] = fd
    return place


def _place(stat: os.stat_result) -> Place:
    return stat.st_dev, stat.st_ino


def _close_unused(place: Place) -> None:
    if place in _files and all(at != place for at, _ in [*_holders]):
        os.close(_files.pop(place))


def _release(held: dict[tuple[str, str], Lock], name: str | None = None) -> None:
    with _guard:
        for key in [key for key in held if name in (None, key[1])]:
            place, at = lock = held.pop(key)
            if not _holders[lock]:  # a parent's
                continue
            _holders[lock] -= 1
            if not _holders[lock]:
                import fcntl

                del _holders[lock]
                fcntl.lockf(_files[place], fcntl.LOCK_UN, 1, at)
                _close_unused(place)


def _refusal(folder: str, name: str, who: str) -> FolderInUseError:
    return FolderInUseError(
        f"{who} is writing '{name}' in {folder}: let it end, or take another folder. Nothing has changed there."
    )
