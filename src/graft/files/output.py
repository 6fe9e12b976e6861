# SPDX-License-Identifier: Apache-2.0
"""Results of verbs: where they may go, what they may replace, and how they come there, whole or not at all."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from graft import CheckpointError, PeftError
from graft.config.atomic import NO_FILE, exchange, is_link, is_special
from graft.core.errors import some
from graft.files.base import INDEX, NEEDED, TORCH_INDEX, WEIGHTS, entries, matches, shards
from graft.files.errors import OptionError, OutputExistsError
from graft.files.formats import FORMATS, module_of

CERTIFICATE = "merge.json"
MODEL = (*NEEDED, INDEX, TORCH_INDEX, CERTIFICATE)  # what stands beside the weights of a model


def check_output(path: str, sources: Iterable[str | os.PathLike[str]], force: bool, model: bool = False) -> None:
    """Raise an error if a result may not go to a path.

    Args:
        force: replace what is there, if it is a file, a link, or a folder with files of one adapter and nothing else.
        model: the result is a model's folder, and replaces nothing but a folder with files of a model.

    Raises:
        OptionError: it is empty; or see `check_apart`.
        OutputExistsError: there is something, and `force` is False, or does not replace that.
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
    is_folder = os.path.isdir(path) and not is_link(path)
    if model and not is_folder:
        raise OutputExistsError(f"{path} is a link or no folder, and stays as it is: give another place.")
    if is_folder and (others := strangers(path, model)):
        raise OutputExistsError(
            f"{path} holds {some(others, 4)}, no file of {'a model' if model else 'an adapter'}, and stays as it is: "
            "move that away, or give another place."
        )


def strangers(folder: str, model: bool) -> list[str]:
    """Return the entries of a folder that are no files of a model, or of one adapter; all, if it has no weights.

    Names alone tell, so that a damaged adapter is one, too.
    """
    kinds = [model_files(folder)] if model else [module_of(name).FOLDER for name in FORMATS]
    found = []
    for weights, others in kinds:
        here = [*entries(folder, (*weights, *others))]
        known = any(is_file and matches(name, weights) for name, is_file in here)
        found.append([n for n, is_file in here if not (known and is_file and matches(n, (*weights, *others)))])
    return min(found, key=len)


def model_files(folder: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names, as in a shell, of the files that stand in a model's folder: weights, others."""
    named: list[str] = []
    if os.path.isfile(os.path.join(folder, INDEX)):
        with suppress(CheckpointError):  # it is damaged, and names none
            named = [glob.escape(name) for name in shards(folder) if name.endswith(".safetensors")]
    return (*WEIGHTS, *named), MODEL


def take_folder(path: str) -> None:
    """Make a folder for work, which nobody else may enter, or take one that a killed run has left.

    Raises:
        OutputExistsError: what stands there is a link, no folder, or another user's.
    """
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        facts = os.lstat(path)
        own = not hasattr(os, "geteuid") or facts.st_uid == os.geteuid()  # Windows has no such numbers
        if not (own and stat.S_ISDIR(facts.st_mode)) or is_link(path):
            raise OutputExistsError(
                f"{path}, where work in progress goes, is a link, no folder, or another user's: remove it, or give "
                "another place for the result."
            ) from None
        os.chmod(path, 0o700)


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
        check_output(target, [], force=True)  # once more, since the work took its time
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
