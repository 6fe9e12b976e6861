# SPDX-License-Identifier: Apache-2.0
# Supported inside: rooms may import this module.
"""Writes of whole files: each is written under a temporary name of this call alone, synced to disk, then renamed.

A reader, or a process that is killed, therefore sees the old file or the new one, never a part.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache

from graft.core.errors import CheckpointError

# a file's content, or a function that writes it to a path; an empty file is already at that path
Write = Callable[[str], None] | bytes | str
TEMPORARY = re.compile(r"\.(?P<of>.+)\.(?P<machine>[0-9a-f]{8})-(?P<pid>[0-9]{1,9})-[0-9a-f]{16}\.tmp")
NO_FILE = "It is a device or a pipe, and stays as it is"
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)  # Windows has none; `is_link` does the check
LONGEST = 24 * 3600  # seconds after which a temporary file of another machine belongs to no running save


def is_special(path: str) -> bool:
    """Return True if a path is a device, a pipe or a socket; False if nothing is there.

    A rename would replace it by a file, so callers refuse it.
    """
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def is_link(path: str) -> bool:
    """Return True if a path is a symbolic link, or a junction of Windows, even one that leads nowhere.

    False if nothing is there.
    """
    try:
        facts = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    junction = getattr(stat, "IO_REPARSE_TAG_MOUNT_POINT", None)  # on Windows alone
    return stat.S_ISLNK(facts.st_mode) or (junction is not None and getattr(facts, "st_reparse_tag", None) == junction)


def check_no_link(folder: str, contents: str) -> None:
    """Raise CheckpointError if `folder` is a symbolic link or a junction: a downloaded folder may contain one that
    leads elsewhere.

    Args:
        contents: names the things to be written there, in the error.
    """
    if is_link(folder):
        raise CheckpointError(
            f"'{folder}' is a symbolic link, so {contents} would be written elsewhere. Remove the link, or save to its "
            "target."
        )


def replace_file(path: str, write: Write) -> None:
    """Write a file under a temporary name, sync it, and rename it to `path`, which holds the old or the new file at any
    time.

    The folder, "." for a path without one, is synced as well; it is not made. Temporary files of this name are deleted
    if processes that no longer run left them.

    Raises:
        OSError: the path is a device or a pipe; or the error of `write`. The old file stays then.
    """
    if is_special(path):
        raise OSError(errno.EINVAL, NO_FILE, path)
    with Scratch(os.path.dirname(path) or ".") as scratch:
        name = os.path.basename(path)
        os.replace(scratch.write(name, write), path)
        sync_file(scratch.folder)
        scratch.paths += [left for left, of in find_abandoned(scratch.folder).items() if of == name]


def exchange_paths(one: str, other: str) -> None:
    """Swap two files or folders.

    Linux and macOS swap them in one step, so that both names exist at any time. Both paths have to exist.

    Other systems, and file systems without that call (NFS), take three renames by a third name. If one of these fails,
    the first ones are undone.
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
    """Swap two paths by one system call (renameat2, or renamex_np on macOS). Return True if that worked.

    Return False if the system has no such call, or if the call fails; nothing has changed then.
    """
    import ctypes  # only where something is replaced

    cwd, swapping = -100, 2  # AT_FDCWD; RENAME_EXCHANGE of Linux is RENAME_SWAP of macOS
    library = ctypes.CDLL(None) if os.name == "posix" else None
    for name, arguments in ("renameat2", (cwd, one, cwd, other, swapping)), ("renamex_np", (one, other, swapping)):
        if hasattr(library, name):
            return not getattr(library, name)(*arguments)
    return False


# bytes of a call: for 2 MiB Linux looks for a huge page, which takes 20 to 100 ms where free memory lies scattered
CHUNK = 1 << 20


def write_pieces(path: str, pieces: Sequence[bytes | memoryview]) -> None:
    """Write a file that consists of these pieces, at most 1 MiB at a time and unbuffered, after its blocks have been
    reserved. An old file is overwritten in place; nothing is synced.
    """
    with open(path, "wb", 0) as f:
        reserve_blocks(f.fileno(), sum(len(piece) for piece in pieces))
        for piece in pieces:
            unwritten = memoryview(piece)
            while unwritten:
                unwritten = unwritten[f.write(unwritten[:CHUNK]) :]


def reserve_blocks(fd: int, size: int) -> None:
    """Have Linux reserve `size` bytes for an empty open file at once: writing them then takes two thirds of the time.

    Where the system or the file system has no such call, or the disk is full, nothing happens and no error is raised.
    So it is for a size of 0. The C library's `posix_fallocate` would write a byte into each block there.
    """
    import ctypes  # only where something is written

    reserve = getattr(ctypes.CDLL(None), "fallocate", None) if os.name == "posix" else None
    if reserve is not None and size:
        reserve(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size))


@contextmanager
def make_folder(path: str) -> Iterator[None]:
    """Make a folder, with those around it, for the block.

    If the block raises, delete the folder, unless it was there before or is not empty. Folders that were made around it
    stay.
    """
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
    """The temporary files of one call in one folder.

    At its end the `with` block deletes those that were not renamed.

    `paths` lists all of them. A file that cannot be deleted stays, and a later save deletes it.
    """

    def __init__(self, folder: str):
        """List temporary files in `folder`, none yet."""
        self.folder, self.paths = folder, list[str]()

    def __enter__(self) -> Scratch:
        """Return this object."""
        return self

    def __exit__(self, *_: object) -> None:
        """Delete the listed files that still exist, without an error for those that cannot be deleted.

        An error of the block is raised on.
        """
        for path in self.paths:
            with suppress(OSError):  # a later save deletes the file
                os.remove(path)

    def create(self, of: str) -> str:
        """Make an empty temporary file for `of`, and return its path.

        Raises FileExistsError if a file or link has that name.
        """
        path = self._add_path(of)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_FOLLOW, 0o666))
        return path

    def write(self, of: str, write: Write) -> str:
        """Make a temporary file for `of`, write its content, sync it to disk, and return its path.

        Args:
            of: name that the file will get later. It is part of the temporary name.
            write: the content as bytes or text, or a function that is passed the path.

        Raises:
            OSError: of writing. Where the system named no file (a full disk), the error gets the final name.
        """
        path = self.create(of)
        try:
            if callable(write):
                write(path)
            else:
                with open(path, "wb") as f:
                    f.write(write.encode() if isinstance(write, str) else write)
            sync_file(path)
        except OSError as e:
            if e.filename is None and e.errno is not None:  # the error of a full disk names no file
                e.filename = os.path.join(self.folder, of)
            raise
        return path

    def add_link(self, path: str) -> str | None:
        """Give a file a second, temporary name by a hard link, and return that path.

        The scratch removes it at its end.

        A symbolic link is not followed. The path is listed in any case. Returns None if there is no such file, or if
        the file system has no hard links.
        """
        link = self._add_path(os.path.basename(path))
        try:
            os.link(path, link, follow_symlinks=False)
        except (OSError, NotImplementedError):
            return None
        return link

    def spare(self, of: str) -> None:
        """Keep the temporary files with an `of` that begins with this text: the end of the block no longer deletes
        them. Without any such file nothing happens.
        """
        self.paths = [path for path in self.paths if not os.path.basename(path).startswith(f".{of}")]

    def _add_path(self, of: str) -> str:
        """Return a new temporary path for `of` and list it in `paths`: ".<of>.<machine>-<process id>-<16 hex
        digits>.tmp".
        """
        path = os.path.join(self.folder, f".{of}.{machine_token()}-{os.getpid()}-{os.urandom(8).hex()}.tmp")
        self.paths.append(path)
        return path


def find_abandoned(folder: str) -> dict[str, str]:
    """Return the temporary files in a folder that no running process uses, as {path: the name that the file would have
    got}. {} without any; nothing is deleted.

    Names that fit `TEMPORARY` count, also those of links. `is_in_use` decides for each. Raises OSError if the folder
    cannot be read.
    """
    with os.scandir(folder) as entries:
        names = {entry.path: match for entry in entries if (match := TEMPORARY.fullmatch(entry.name))}
    return {path: m["of"] for path, m in names.items() if not is_in_use(path, m["machine"], int(m["pid"]))}


def is_in_use(path: str, where: str, pid: int) -> bool:
    """Return True if the process that made a temporary file may still run.

    False if the file was made on this machine (`where` is its token), on POSIX, by a process that does not run. Else
    True while the file was changed less than 24 hours ago, and for a file that is gone.
    """
    if where == machine_token() and os.name == "posix" and not is_alive(pid):  # elsewhere `os.kill` would end it
        return False
    try:
        return time.time() - os.lstat(path).st_mtime < LONGEST
    except FileNotFoundError:
        return True


def is_alive(pid: int) -> bool:
    """Return True if a process with this id runs, of any user.

    On Windows `os.kill` would end it: call this on POSIX only.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return True


@cache
def machine_token() -> str:
    """Return 8 hex digits for this boot of this machine and its space of process ids, within which an id names one
    process.

    On Linux they hash the boot id and the process namespace, elsewhere the machine's name. Cached.
    """
    import hashlib  # these two only where something is written
    import platform

    try:
        with open("/proc/sys/kernel/random/boot_id") as f:
            identity = f.read() + os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        identity = platform.node()
    return hashlib.sha256(identity.encode()).hexdigest()[:8]


def sync_file(path: str) -> None:
    """Wait until the disk has a file's or folder's content (fsync); the file is opened to read for that, and closed.

    Raises OSError.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
