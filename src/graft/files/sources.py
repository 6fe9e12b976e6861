# SPDX-License-Identifier: Apache-2.0
"""Paths of adapters and bases, hub ids with a revision, and outputs that appear completely or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from graft import CheckpointError, PeftError
from graft.config import pair
from graft.config.atomic import exchange_paths, is_link, is_special
from graft.config.reading import open_file, read_object
from graft.core.errors import join_some
from graft.files.base import BaseDescription as Base
from graft.files.base import list_folder_entries, matches_any, model_file_patterns, read_base_files
from graft.files.bases import open_base
from graft.files.errors import BaseNeededError, OptionError, OutputExistsError
from graft.files.formats import FORMATS, module_of, read
from graft.files.neutral import AdapterFile

HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
BASE_ID = re.compile(r"(?P<repo>([\w.-]+/)?[\w.-]+)(@(?P<revision>[\w./-]+))?")  # old models such as gpt2 have no owner
# the base's name in configs of PEFT and torchtune, AdapterHub, MLX
BASE_FIELDS = ("base_model_name_or_path", "model_name", "model")
CARD = "README.md"
Result = TypeVar("Result")


def open_adapter(source: str, base: Base | None = None) -> AdapterFile:
    """Read an adapter of any format from a file, a folder, or the hub (`user/repo@rev`).

    Only a hub id uses the network.

    Args:
        base: the base model's names, where the format needs them.

    Raises:
        CheckpointError: there is no adapter, or it is damaged.
    """
    return read(resolve_adapter(source), base)


def resolve_adapter(source: str) -> str:
    """Return the path of an adapter: `source` itself, or the cache folder of a hub id.

    Missing files of a hub id are downloaded: config, weights and README.md.

    A source that exists, or is no hub id, is returned unchanged. Raises CheckpointError if the hub has no such adapter.
    """
    named = None if os.path.exists(source) else HUB_ID.fullmatch(source)
    return source if named is None else pair.fetch_adapter(named["repo"], named["revision"], CARD)


def find_base(base: str | os.PathLike[str]) -> str:
    """Return the path of a base model: `base`, or the cached folder of a hub id (user/repo@revision; owner and revision
    may lack).

    The network is never used.

    A path that exists, or that has no form of a hub id, is returned unchanged.

    Raises:
        CheckpointError: `base` is a hub id that is not in the cache.
    """
    base = os.fspath(base)
    named = None if os.path.exists(base) else BASE_ID.fullmatch(base)
    if named is None:
        return base
    from huggingface_hub import errors, snapshot_download

    try:
        return snapshot_download(named["repo"], revision=named["revision"], local_files_only=True)
    except (errors.LocalEntryNotFoundError, errors.HFValidationError):
        words = " --revision ".join(filter(None, (named["repo"], named["revision"])))
        raise CheckpointError(
            f"There is no folder {base}, and the hub's cache has no model of that name. Fetch it: hf download {words}"
        ) from None


def read_base_name(adapter: str) -> str | None:
    """Return the base in the adapter_config.json of a folder, for `find_base`; None without that file or a name.

    The first text counts of the fields base_model_name_or_path, model_name and model. A damaged file raises
    CheckpointError.

    Paths on another machine (//host/share, or with backslashes) are None, since opening one would send credentials
    there.
    """
    path = os.path.join(adapter, pair.CONFIG_NAME)
    config = read_object(path) if os.path.isfile(path) else {}
    name = next((name for field in BASE_FIELDS if isinstance(name := config.get(field), str) and name), None)
    return None if name is None or name.startswith(("//", "\\\\")) else name


def require_base(adapter: str, base: str | None) -> str:
    """Return the path of the base model: of `base`, or if that is None, of the adapter's own.

    Raises:
        BaseNeededError: `base` is None, and the adapter names none.
        CheckpointError: the base is not on this machine.
    """
    name = read_base_name(adapter) if base is None else base
    if name is None:
        raise BaseNeededError(f"{adapter} names no base model. Give one with --base: a folder or a hub id.")
    return find_base(name)


def run_with_base(adapter: str, base: str | None, run: Callable[[Base | None], Result]) -> Result:
    """Return `run(base)` for the opened base. If `base` is None, call `run(None)` first.

    If that raises BaseNeededError and the adapter names a base, call `run` again with that base.

    Raises:
        BaseNeededError: `run` needs a base, and the adapter names none.
        CheckpointError: the base is not on this machine, or damaged. Errors of `run` pass through.
    """
    if base is not None:
        return run(open_base(find_base(base)))
    try:
        return run(None)
    except BaseNeededError:
        if read_base_name(adapter) is None:
            raise
    return run(open_base(require_base(adapter, None)))


def describe_named_base(adapter: str) -> Base | None:
    """Return a new `Base` with path, config, shapes and module names, without values, of the base that an adapter
    names.

    None if it names none. Also None for any CheckpointError: the files are damaged or not on this machine.
    """
    try:
        name = read_base_name(adapter)
        base = None if name is None else read_base_files(find_base(name))
    except CheckpointError:
        return None
    return None if base is None else Base(base.path, base.config, base.shapes, [*base.modules])


def read_licence(folder: str) -> str | None:
    """Return the field `license` in the YAML header of a folder's README.md; None without file, header or field.

    Only the first 100,000 bytes are read.
    """
    path = os.path.join(folder, CARD)
    if not os.path.isfile(path):
        return None
    with open_file(path) as f:
        text = f.read(100_000).decode("utf-8-sig", "replace")
    head = re.match(r"---\r?\n(.*?)\n---", text, re.DOTALL)
    match = head and re.search(r"^license:\s*['\"]?([\w.+-]+)", head[1], re.MULTILINE)
    return match[1] if match else None


def check_output(path: str, sources: Iterable[str | os.PathLike[str]], force: bool, model: bool = False) -> None:
    """Raise an error if a result may not be written to a path.

    Nothing changes. A free path or an empty folder passes.

    Args:
        sources: paths that the output may not overlap.
        force: allow to replace a file, a link, or a folder with only the files of one adapter.
        model: the result is a model's folder. With `force` it may replace a folder with only a model's files, and
            neither a file nor a link.

    Raises:
        OptionError: the path is empty, or overlaps a source.
        OutputExistsError: the path exists and may not be replaced, or is a pipe or device, also with `force`.
    """
    if not path:
        raise OptionError("The output has no name. Give a path.")
    check_output_is_apart(path, sources)
    if not os.path.lexists(path) or (os.path.isdir(path) and not os.listdir(path)):
        return
    if is_special(path):
        raise OutputExistsError(f"{path}: It is a device or a pipe, and stays as it is. Give another output.")
    if not force:
        raise OutputExistsError(f"{path} exists. Pass force=True (--force) to replace it.")
    is_folder = os.path.isdir(path) and not is_link(path)
    if model and not is_folder:
        raise OutputExistsError(f"{path} is a link or no folder, and is not replaced. Give another output.")
    if is_folder and (foreign := list_foreign_entries(path, model)):
        raise OutputExistsError(
            f"{path} holds {join_some(foreign, 4)}, which is no file of {'a model' if model else 'an adapter'}. Move "
            "that away, or give another output."
        )


def list_foreign_entries(folder: str, model: bool) -> list[str]:
    """Return the entries of a folder that do not belong to a model (`model`), or otherwise to one adapter of any
    format.

    Files are judged by their names. If the folder has no weights, all entries are foreign. The format with the fewest
    foreign entries counts.
    """
    kinds = [model_file_patterns(folder)] if model else [module_of(name).FOLDER for name in FORMATS]
    foreign = []
    for weights, extras in kinds:
        present = [*list_folder_entries(folder, (*weights, *extras))]
        known = any(is_file and matches_any(name, weights) for name, is_file in present)
        foreign.append([n for n, is_file in present if not (known and is_file and matches_any(n, (*weights, *extras)))])
    return min(foreign, key=len)


def take_work_folder(path: str) -> None:
    """Create a folder that only this user may enter, or take over one of this user that an earlier run left.

    A folder that is taken over keeps its files, and its mode becomes 0700. Where the system has no user numbers, as on
    Windows, any owner passes.

    Raises:
        OutputExistsError: the path is a link, no folder, or another user's.
    """
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        facts = os.lstat(path)
        is_own = not hasattr(os, "geteuid") or facts.st_uid == os.geteuid()  # Windows has no user numbers
        if not (is_own and stat.S_ISDIR(facts.st_mode)) or is_link(path):
            raise OutputExistsError(
                f"{path}, the folder for work in progress, is a link, no folder, or another user's. Remove it, or give "
                "another output."
            ) from None
        os.chmod(path, 0o700)


def check_output_is_apart(path: str, sources: Iterable[str | os.PathLike[str]]) -> None:
    """Raise OptionError if a result's path equals, lies in, or contains an existing source. Links are resolved."""
    output = os.path.realpath(path)
    for source in filter(os.path.exists, sources):
        source_path = os.path.realpath(source)
        if os.path.commonpath([output, source_path]) in (output, source_path):
            raise OptionError(
                f"{path} is the source {os.fspath(source)}, or one lies in the other. Give another output."
            )


@contextmanager
def place_when_done(path: str, stays: bool = True) -> Iterator[str]:
    """Yield a temporary path in a new folder next to `path`; after the `with` block, move the file or folder from there
    to `path`. The new folder is deleted in all cases.

    Missing parent folders are made first. An existing result is replaced only at the end. After an error it is
    unchanged, and new parent folders are removed if empty.

    Args:
        stays: False: a dry run: the result is written to the temporary directory and deleted.

    Raises:
        OutputExistsError: another process wrote `path` meanwhile.
        CheckpointError: the block wrote nothing.
        OSError: writing failed, for example on a full disk; it names `path` in place of the temporary path.
    """
    path = os.path.abspath(path)
    folder, stood = os.path.dirname(path), os.path.lexists(path)
    new_folders = [] if os.path.isdir(folder) or not stays else list_missing_folders(folder)
    # the name is chosen first, so that an interrupt in between leaves nothing
    room = os.path.join(folder if stays else tempfile.gettempdir(), f".graft-{os.urandom(8).hex()}")
    try:
        if stays:
            os.makedirs(folder, exist_ok=True)
        os.mkdir(room, 0o700)
        new = os.path.join(room, os.path.basename(path))
        yield new
        if stays:
            place_result(new, path, stood)
        new_folders = []
    except PeftError:
        raise
    except OSError as e:
        if str(e.filename or room).startswith(room):  # the error of a full disk has no file name
            raise OSError(e.errno or errno.EIO, e.strerror or str(e), path) from e
        raise
    finally:
        delete_folder(room)
        for parent in new_folders:
            if os.path.isdir(parent) and not os.listdir(parent):
                os.rmdir(parent)


def delete_folder(folder: str) -> None:
    """Delete a folder if it exists, ignoring errors.

    After an interrupt, or any exception, it is deleted once more, then that is raised.
    """
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def list_missing_folders(folder: str) -> list[str]:
    """Return a folder and its parents that do not exist, the innermost first."""
    out = []
    while not os.path.lexists(folder):
        out.append(folder)
        folder = os.path.dirname(folder)
    return out


def place_result(temporary: str, target: str, stood: bool) -> None:
    """Move a result to its target path.

    If `stood` (the target existed before) and it is still there, exchange the two: the old result gets the temporary
    path.

    Raises OutputExistsError if another process created the target, or the old one may not be replaced (`check_output`
    with `force`); CheckpointError if there is no result.
    """
    if not os.path.exists(temporary):
        raise CheckpointError(f"Nothing was written for {target}.")
    if stood and os.path.lexists(target):
        check_output(target, [], force=True)  # again, since the work took time
        exchange_paths(temporary, target)
    else:
        move_to_free_name(temporary, target)


def move_to_free_name(source: str, target: str) -> None:
    """Move a file or folder to a path that must not exist.

    A file is hard-linked, which never replaces anything; its temporary name stays. Without hard links, and for folders,
    it is renamed after a check.

    Raises:
        OutputExistsError: the path exists now.
        OSError: it failed for another reason.
    """
    try:
        try:
            os.link(source, target)  # unlike renaming, a link never replaces a file
        except FileExistsError:
            raise
        except OSError:  # a folder, or the file system has no hard links
            if os.path.lexists(target):  # os.rename would replace a file or an empty folder
                raise FileExistsError from None
            os.rename(source, target)
    except OSError as e:
        if not os.path.lexists(target):
            raise
        raise OutputExistsError(f"{target} was created by another process meanwhile. Give another output.") from e
