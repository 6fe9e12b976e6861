# SPDX-License-Identifier: Apache-2.0
"""Results of verbs: where they may go, and how they come there, whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from graft.config.atomic import NO_FILE, exchange, is_special
from graft.core.errors import CheckpointError, PeftError
from graft.files.errors import OptionError, OutputExistsError
from graft.files.formats import recognise


def check_output(path: str, sources: Iterable[str | os.PathLike[str]], force: bool) -> None:
    """Raise an error if a result may not go to a path.

    Raises:
        OptionError: it is empty; or see `check_apart`.
        OutputExistsError: there is something, and `force` is False; or it is a folder that is no adapter, or a device.
    """
    if not path:
        raise OptionError("The output has no name.")
    check_apart(path, sources)
    if not os.path.lexists(path) or (os.path.isdir(path) and not os.listdir(path)):
        return
    if is_special(path):
        raise OutputExistsError(f"{path}: {NO_FILE}. Give another place for the result.")
    if not force:
        raise OutputExistsError(f"{path} exists: pass force=True (--force) to replace it.")
    if os.path.isdir(path) and not os.path.islink(path) and not is_adapter(path):
        raise OutputExistsError(f"{path} holds something else than an adapter, and stays as it is: remove it yourself.")


def check_apart(path: str, sources: Iterable[str | os.PathLike[str]]) -> None:
    """Raise OptionError if a result would stand on, in or around a source, which nothing ever changes."""
    here = os.path.realpath(path)
    for source in filter(os.path.exists, sources):
        there = os.path.realpath(source)
        if os.path.commonpath([here, there]) in (here, there):
            raise OptionError(
                f"{path} is the source {os.fspath(source)}, or one lies in the other: sources stay as they are. Give "
                "another place for the result."
            )


def is_adapter(folder: str) -> bool:
    """Return True if a folder is an adapter, whole or damaged, or has one for each part of a pipeline."""
    try:
        return bool(recognise(folder))
    except CheckpointError as e:
        return "damaged" in str(e) or "cut off" in str(e)


@contextmanager
def appearing(path: str, stays: bool = True) -> Iterator[str]:
    """Yield another path to write a file or folder to; afterwards it gets its name.

    What stands there leaves only when the new one has come, and an error leaves it as it was.

    Args:
        stays: False: nothing stays; whatever can fail has been tried.

    Raises:
        OutputExistsError: something has come there meanwhile.
        OSError: the disk is full, say; it names `path`.
    """
    path = os.path.abspath(path)
    folder, stood = os.path.dirname(path), os.path.lexists(path)
    made = [] if os.path.isdir(folder) or not stays else missing(folder)
    # named before it is made: an interrupt in between leaves nothing
    room = os.path.join(folder if stays else tempfile.gettempdir(), f".graft-{os.urandom(8).hex()}")
    try:
        if stays:
            os.makedirs(folder, exist_ok=True)
        os.mkdir(room, 0o700)
        new = os.path.join(room, os.path.basename(path))
        yield new
        if stays:
            put(new, path, stood)
        made = []
    except PeftError:
        raise
    except OSError as e:
        if str(e.filename or room).startswith(room):  # a full disk does not say whose
            raise OSError(e.errno or errno.EIO, e.strerror or str(e), path) from e
        raise
    finally:
        clear(room)
        for parent in made:
            if os.path.isdir(parent) and not os.listdir(parent):
                os.rmdir(parent)


def clear(folder: str) -> None:
    """Delete a folder, if it is there; an interrupt meanwhile comes when it is gone."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def missing(folder: str) -> list[str]:
    """Return a folder and those around it that are not there, the innermost first."""
    out = []
    while not os.path.lexists(folder):
        out.append(folder)
        folder = os.path.dirname(folder)
    return out


def put(made: str, target: str, stood: bool) -> None:
    """Rename a result to its target. An old result gets its name, to be deleted; one of another process stays."""
    if is_special(target):
        raise OSError(errno.EINVAL, NO_FILE, target)
    if not os.path.exists(made):
        raise CheckpointError(f"Nothing was written for {target}.")
    if stood and os.path.lexists(target):
        exchange(made, target)
    else:
        move(made, target)


def move(made: str, target: str) -> None:
    """Rename a file or folder to a name that nothing has.

    Raises:
        OutputExistsError: something has come there, from another process.
    """
    try:
        if os.path.isdir(made):
            if os.path.lexists(target):  # renaming would replace an empty folder
                raise FileExistsError
            os.rename(made, target)
            return
        try:
            os.link(made, target)  # which replaces nothing, as renaming does
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            if os.path.lexists(target):
                raise FileExistsError from None
            os.rename(made, target)
    except OSError as e:
        if not os.path.lexists(target):
            raise
        raise OutputExistsError(f"{target} has come meanwhile, from another process, and stays as it is.") from e
