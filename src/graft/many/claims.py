# SPDX-License-Identifier: Apache-2.0
"""Names in a folder that one process alone writes until it ends, however it ends: a locked file for each name."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from graft import FolderInUseError, PeftWarning
from graft.config.atomic import check_no_link
from graft.core.errors import warn

if TYPE_CHECKING:
    from filelock import BaseFileLock

LOCKS = ".locks"  # the folder of these files, which stay, empty
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # errors of file systems without locks
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


class Claims:
    """The names that this process holds in folders, until `release`, until this object is collected, or until the
    process ends.

    Several objects in one process may hold the same name.
    """

    def __init__(self) -> None:
        self._held: dict[BaseFileLock, str] = {}  # and the name of each; the last object that drops a lock ends it

    def claim(self, folder: str, names: Iterable[str], alone: bool = False) -> None:
        """Lock names in a folder, all or none of them; names that this object holds already are skipped.

        Makes the folder `.locks` with an empty file for each name. Waits 0.1 s for each lock. Where the folder cannot
        be written, nothing new is held; where the file system has no locks, neither, with a PeftWarning.

        Args:
            alone: also refuse a name that another object in this process holds.

        Raises:
            FolderInUseError: another process, or with `alone` this one, holds one of them.
            CheckpointError: one of them, or its lock, is a symbolic link.
            OSError: the lock file cannot be made for another reason.
        """
        from filelock import FileLock, Timeout

        names, locks = [*names], os.path.join(os.path.abspath(folder), LOCKS)
        for path in (locks, *(os.path.join(locks, f"{name}.lock") for name in names)):
            check_no_link(path, "locks")
        for name in names:
            check_no_link(os.path.join(folder, name), f"'{name}'")
        new: dict[BaseFileLock, str] = {}
        with ExitStack() as undo:
            for name in names:
                path = os.path.join(locks, f"{name}.lock")
                # filelock counts holders in one object per process and path; a forked child has another, which is free
                lock = FileLock(path, thread_local=False, is_singleton=True, fallback_to_soft=False)
                if lock in self._held:
                    continue
                try:
                    undo.enter_context(lock.acquire(timeout=0.1))  # until another thread here has it
                    if alone and lock.lock_counter > 1:
                        raise Timeout(path)
                except Timeout:
                    who = "This" if lock.is_locked else "Another"
                    raise FolderInUseError(
                        f"{who} process is writing '{name}' in {folder}, and nothing has changed there. Let it end, or "
                        "pass another folder."
                    ) from None
                except OSError as error:
                    if error.errno in NO_LOCKS:
                        warn(
                            f"{folder} is on a file system without locks ({error}), so that two processes could write "
                            "there at once. Start only one.",
                            PeftWarning,
                        )
                    elif error.errno not in READ_ONLY:
                        raise
                    return
                new[lock] = name
            undo.pop_all()
            self._held |= new

    def release(self, name: str | None = None) -> None:
        """Release a name, in all folders; None: all names.

        The lock ends if no other object of this process holds it.
        """
        for lock in [lock for lock, its in self._held.items() if name in (None, its)]:
            del self._held[lock]
            lock.release()
