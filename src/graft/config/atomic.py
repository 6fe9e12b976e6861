# SPDX-License-Identifier: Apache-2.0
# Supported inside: rooms may import this module.
"""Put files in place whole: each is written under a name that no other call uses, synced, then renamed."""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache

from graft.core.errors import CheckpointError

# a file's content, or a function that writes it to a path, at which an empty file is already
Write = Callable[[str], None] | bytes | str
TEMPORARY = re.compile(r"\.(?P<of>.+)\.(?P<machine>[0-9a-f]{8})-(?P<pid>[0-9]{1,9})-[0-9a-f]{16}\.tmp")
NO_FILE = "It is a device or a pipe, and stays as it is"
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)  # Windows has none: `is_link` looks there
LONGEST = 24 * 3600  # seconds after which a temporary file of another machine belongs to no running save


def is_special(path: str) -> bool:
    """Return True if a device, a pipe or a socket stands at a path: a rename would put a file in its place."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def is_link(path: str) -> bool:
    """Return True if a symbolic link, or a junction of Windows, stands at a path, wherever it leads."""
    try:
        facts = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    junction = getattr(stat, "IO_REPARSE_TAG_MOUNT_POINT", None)  # on Windows alone
    return stat.S_ISLNK(facts.st_mode) or (junction is not None and getattr(facts, "st_reparse_tag", None) == junction)


def check_no_link(folder: str, what: str) -> None:
    """Raise CheckpointError if a folder is a link, which may have come with a folder from elsewhere.

    what: is to be written there, for the error.
    """
    if is_link(folder):
        raise CheckpointError(
            f"'{folder}' is a symbolic link, and {what} would be written to where it leads: remove the link, or save "
            "to that folder itself."
        )


def replace_file(path: str, write: Write) -> None:
    """Write a file. Whatever happens meanwhile, the path holds the old one or the new one, whole.

    Temporary files that killed processes have left of it go.

    Raises:
        OSError: the path is a device or a pipe, which the file would replace; or what writing raises.
    """
    if is_special(path):
        raise OSError(errno.EINVAL, NO_FILE, path)
    with Scratch(os.path.dirname(path) or ".") as scratch:
        name = os.path.basename(path)
        os.replace(scratch.write(name, write), path)
        sync_file(scratch.folder)
        scratch.paths += [left for left, of in find_abandoned(scratch.folder).items() if of == name]


def exchange_paths(one: str, other: str) -> None:
    """Swap two files or folders, in one step where the system has it: no kill leaves either name without a file.

    Elsewhere, and on file systems that cannot (NFS), one goes by a third name.
    """
    if swap_by_system(os.fsencode(one), os.fsencode(other)):
        return
    third = f"{one}-{os.urandom(8).hex()}"
    try:
        os.rename(other, third)
        os.rename(one, other)
    except BaseException:
        if os.path.lexists(third):
            os.rename(third, one if os.path.lexists(other) else other)
        raise
    os.rename(third, one)


def swap_by_system(one: bytes, other: bytes) -> bool:
    """Have the system's own call swap two paths; return False if there is none, or it does not go there."""
    import ctypes  # only where something is replaced

    cwd, swapping = -100, 2  # AT_FDCWD; RENAME_EXCHANGE of Linux is RENAME_SWAP of macOS
    library = ctypes.CDLL(None) if os.name == "posix" else None
    for name, arguments in ("renameat2", (cwd, one, cwd, other, swapping)), ("renamex_np", (one, other, swapping)):
        if hasattr(library, name):
            return not getattr(library, name)(*arguments)
    return False


@contextmanager
def make_folder(path: str) -> Iterator[None]:
    """Have a folder to write into; one that was not there goes again if writing fails."""
    new = not os.path.isdir(path)
    os.makedirs(path, exist_ok=True)
    try:
        yield
    except BaseException:
        if new:
            with suppress(OSError):  # another process has written into it
                os.rmdir(path)
        raise


class Scratch:
    """The temporary files of one call in one folder. Leaving the block deletes those that have not been renamed."""

    def __init__(self, folder: str):
        self.folder, self.paths = folder, list[str]()

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *_: object) -> None:
        for path in self.paths:
            with suppress(OSError):  # the next save clears what cannot be deleted now
                os.remove(path)

    def create(self, of: str) -> str:
        """Make an empty file; return its path. A file or link that is there already is an error, never used."""
        path = self._add_path(of)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_FOLLOW, 0o666))
        return path

    def write(self, of: str, write: Write) -> str:
        """Make a file with the content `write`, and have the disk confirm it; return its path."""
        path = self.create(of)
        try:
            if callable(write):
                write(path)
            else:
                with open(path, "wb") as f:
                    f.write(write.encode() if isinstance(write, str) else write)
            sync_file(path)
        except OSError as e:
            if e.filename is None and e.errno is not None:  # a disk that is full does not say whose
                e.filename = os.path.join(self.folder, of)
            raise
        return path

    def add_link(self, path: str) -> str | None:
        """Give a file a second name and return that; None if there is no such file, or there are no hard links."""
        link = self._add_path(os.path.basename(path))
        try:
            os.link(path, link, follow_symlinks=False)
        except (OSError, NotImplementedError):
            return None
        return link

    def spare(self, of: str) -> None:
        """Do not delete the files whose `of` begins so."""
        self.paths = [path for path in self.paths if not os.path.basename(path).startswith(f".{of}")]

    def _add_path(self, of: str) -> str:
        path = os.path.join(self.folder, f".{of}.{machine_token()}-{os.getpid()}-{os.urandom(8).hex()}.tmp")
        self.paths.append(path)
        return path


def find_abandoned(folder: str) -> dict[str, str]:
    """Return the temporary files in a folder whose process is no more: path → what it is of. Links count, too."""
    with os.scandir(folder) as entries:
        names = {entry.path: match for entry in entries if (match := TEMPORARY.fullmatch(entry.name))}
    return {
        path: match["of"] for path, match in names.items() if not is_in_use(path, match["machine"], int(match["pid"]))
    }


def is_in_use(path: str, where: str, pid: int) -> bool:
    """Return True if the process that made a temporary file may still run."""
    if where == machine_token() and os.name == "posix" and not is_alive(pid):  # elsewhere `os.kill` would end it
        return False
    try:
        return time.time() - os.lstat(path).st_mtime < LONGEST
    except FileNotFoundError:
        return True


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return True


@cache
def machine_token() -> str:
    """Return a token of this boot of this machine and of this space of process ids, in which a number is a process."""
    import hashlib  # these two only where something is written
    import platform

    try:
        with open("/proc/sys/kernel/random/boot_id") as f:
            identity = f.read() + os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        identity = platform.node()
    return hashlib.sha256(identity.encode()).hexdigest()[:8]


def sync_file(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
