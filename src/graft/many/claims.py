# SPDX-License-Identifier: Apache-2.0
"""Names in a folder that one process alone writes, until it ends, however that ends: a locked file for each."""

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
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # what file systems without locks say
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


class Claims:
    """What this process alone writes in folders, until somebody releases it, or it is collected, or the process ends.

    Several in one process may hold the same.
    """

    def __init__(self) -> None:
        self._held: dict[BaseFileLock, str] = {}  # and the name of each; who is the last to drop a lock ends it

    def claim(self, folder: str, names: Iterable[str], alone: bool = False) -> None:
        """Claim names in a folder, all or none of them. Where nothing can be written, there is nothing to claim.

        Args:
            alone: refuse what others in this process hold, too.

        Raises:
            FolderInUseError: another process holds one of them.
            CheckpointError: one of them, or its lock, is a symbolic link.
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
                # one object for all in this process, which counts them; a forked child gets another, not held
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
                        f"{who} process is writing '{name}' in {folder}: let it end, or take another folder. Nothing "
                        "has changed there."
                    ) from None
                except OSError as error:
                    if error.errno in NO_LOCKS:
                        warn(
                            f"{folder} is on a system whose files have no locks ({error}): nobody notices if two "
                            "processes write there at once. Let one at a time do so.",
                            PeftWarning,
                        )
                    elif error.errno not in READ_ONLY:
                        raise
                    return
                new[lock] = name
            undo.pop_all()
            self._held |= new

    def release(self, name: str | None = None) -> None:
        """Let others claim a name, in any folder; None: all that is held."""
        for lock in [lock for lock, its in self._held.items() if name in (None, its)]:
            del self._held[lock]
            lock.release()
