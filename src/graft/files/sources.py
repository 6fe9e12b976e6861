# SPDX-License-Identifier: Apache-2.0
"""Where adapters come from and go to: paths, hub ids with a revision; results that appear whole or not at all."""

from __future__ import annotations

import errno
import glob
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TypeVar

from graft import CheckpointError, PeftError
from graft.config.atomic import NO_FILE, exchange_paths, is_link, is_special
from graft.config.hub import describe_offline, fetch_file
from graft.config.pair import CONFIG_NAME, SAFETENSORS, TORCH
from graft.config.reading import open_file, read_object
from graft.core.errors import join_some
from graft.files.base import (
    INDEX,
    NEEDED,
    TORCH_INDEX,
    WEIGHTS,
    BaseDescription,
    Skeleton,
    list_folder_entries,
    list_shards,
    matches_any,
    read_base_files,
)
from graft.files.bases import open_base
from graft.files.errors import BaseNeededError, OptionError, OutputExistsError
from graft.files.formats import FORMATS, module_of, read
from graft.files.neutral import AdapterFile

if TYPE_CHECKING:
    from graft.files.formats import Base

HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
BASE_ID = re.compile(r"(?P<repo>([\w.-]+/)?[\w.-]+)(@(?P<revision>[\w./-]+))?")  # old models have no owner: gpt2
BASE_FIELDS = ("base_model_name_or_path", "model_name", "model")  # of PEFT and torchtune, AdapterHub, MLX
CARD = "README.md"
Result = TypeVar("Result")


def read_adapter(source: str, base: Base | None = None) -> AdapterFile:
    """Read an adapter from a file, a folder, or the hub (`user/repo@rev`), which is asked for nothing else.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    return read(resolve_adapter(source), base)


def resolve_adapter(source: str) -> str:
    """Return the path of an adapter: the source itself, or where the hub's files are kept."""
    named = None if os.path.exists(source) else HUB_ID.fullmatch(source)
    if named is None:
        return source
    hub = {"revision": named["revision"]} if named["revision"] else {}
    config = fetch_file(named["repo"], CONFIG_NAME, **hub)
    if config is None or all(fetch_file(named["repo"], name, **hub) is None for name in (SAFETENSORS, TORCH)):
        raise CheckpointError(f"There is no adapter at '{source}'{describe_offline(named['repo'])}.")
    fetch_file(named["repo"], CARD, **hub)
    return os.path.dirname(config)


def find_base(base: str | os.PathLike[str]) -> str:
    """Return the path of a base model: `base`, or the snapshot of a hub id (user/repo@revision) in the hub's cache.

    The network is never asked.

    Raises:
        CheckpointError: `base` is neither a path nor in the cache.
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
    """Return the base model that an adapter's adapter_config.json names, as `find_base` takes it; None: there is none.

    A path on another machine (//host/share) is no name: looking for it would log in there.
    """
    path = os.path.join(adapter, CONFIG_NAME)
    config = read_object(path) if os.path.isfile(path) else {}
    name = next((name for field in BASE_FIELDS if isinstance(name := config.get(field), str) and name), None)
    return None if name is None or name.startswith(("//", "\\\\")) else name


def require_base(adapter: str, base: str | None) -> str:
    """Return the path of `base`, or of the base model that the adapter names.

    Raises:
        BaseNeededError: `base` is None, and the adapter names none.
        CheckpointError: it is not here.
    """
    name = read_base_name(adapter) if base is None else base
    if name is None:
        raise BaseNeededError(f"{adapter} names no base model. Give one with --base: a folder or a hub id.")
    return find_base(name)


def run_with_base(adapter: str, base: str | None, run: Callable[[BaseDescription | None], Result]) -> Result:
    """Return `run` of the model `base`. If `base` is None, `run` gets the adapter's own base if it needs one.

    Raises:
        BaseNeededError: `run` needs a base, and there is none.
        CheckpointError: the base is not here, or damaged. Errors of `run` pass through.
    """
    if base is not None:
        return run(open_base(find_base(base)))
    try:
        return run(None)
    except BaseNeededError:
        if read_base_name(adapter) is None:
            raise
    return run(open_base(require_base(adapter, None)))


def describe_named_base(adapter: str) -> Skeleton | None:
    """Return names and shapes of the base that an adapter names; None if it names none, or its files are not here."""
    try:
        name = read_base_name(adapter)
        base = None if name is None else read_base_files(find_base(name))
    except CheckpointError:
        return None
    return None if base is None else Skeleton(base.path, base.config, base.shapes, [*base.modules])


def read_licence(folder: str) -> str | None:
    """Return the licence that a card names; None if there is no card, or it names none."""
    path = os.path.join(folder, CARD)
    if not os.path.isfile(path):
        return None
    with open_file(path) as f:
        text = f.read(100_000).decode("utf-8-sig", "replace")
    head = re.match(r"---\r?\n(.*?)\n---", text, re.DOTALL)
    match = head and re.search(r"^license:\s*['\"]?([\w.+-]+)", head[1], re.MULTILINE)
    return match[1] if match else None


CERTIFICATE = "merge.json"
MODEL = (*NEEDED, INDEX, TORCH_INDEX, CERTIFICATE)  # what stands beside the weights of a model


def check_output(path: str, sources: Iterable[str | os.PathLike[str]], force: bool, model: bool = False) -> None:
    """Raise an error if a result may not go to a path.

    Args:
        force: replace what is there, if it is a file, a link, or a folder with files of one adapter and nothing else.
        model: the result is a model's folder, and replaces nothing but a folder with files of a model.

    Raises:
        OptionError: it is empty; or see `check_output_is_apart`.
        OutputExistsError: there is something, and `force` is False, or does not replace that.
    """
    if not path:
        raise OptionError("The output has no name.")
    check_output_is_apart(path, sources)
    if not os.path.lexists(path) or (os.path.isdir(path) and not os.listdir(path)):
        return
    if is_special(path):
        raise OutputExistsError(f"{path}: {NO_FILE}. Give another place for the result.")
    if not force:
        raise OutputExistsError(f"{path} exists: pass force=True (--force) to replace it.")
    is_folder = os.path.isdir(path) and not is_link(path)
    if model and not is_folder:
        raise OutputExistsError(f"{path} is a link or no folder, and stays as it is: give another place.")
    if is_folder and (foreign := list_foreign_entries(path, model)):
        raise OutputExistsError(
            f"{path} holds {join_some(foreign, 4)}, no file of {'a model' if model else 'an adapter'}, and stays as "
            "it is: "
            "move that away, or give another place."
        )


def list_foreign_entries(folder: str, model: bool) -> list[str]:
    """Return the entries of a folder that are no files of a model, or of one adapter; all, if it has no weights.

    Names alone tell, so that a damaged adapter is one, too.
    """
    kinds = [model_file_patterns(folder)] if model else [module_of(name).FOLDER for name in FORMATS]
    leftovers = []
    for weights, companions in kinds:
        present = [*list_folder_entries(folder, (*weights, *companions))]
        known = any(is_file and matches_any(name, weights) for name, is_file in present)
        leftovers.append(
            [n for n, is_file in present if not (known and is_file and matches_any(n, (*weights, *companions)))]
        )
    return min(leftovers, key=len)


def model_file_patterns(folder: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names, as in a shell, of the files that stand in a model's folder: weights, others."""
    named: list[str] = []
    if os.path.isfile(os.path.join(folder, INDEX)):
        with suppress(CheckpointError):  # it is damaged, and names none
            named = [glob.escape(name) for name in list_shards(folder) if name.endswith(".safetensors")]
    return (*WEIGHTS, *named), MODEL


def take_work_folder(path: str) -> None:
    """Make a folder for work, which nobody else may enter, or take one that a killed run has left.

    Raises:
        OutputExistsError: what stands there is a link, no folder, or another user's.
    """
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        facts = os.lstat(path)
        is_own = not hasattr(os, "geteuid") or facts.st_uid == os.geteuid()  # Windows has no such numbers
        if not (is_own and stat.S_ISDIR(facts.st_mode)) or is_link(path):
            raise OutputExistsError(
                f"{path}, where work in progress goes, is a link, no folder, or another user's: remove it, or give "
                "another place for the result."
            ) from None
        os.chmod(path, 0o700)


def check_output_is_apart(path: str, sources: Iterable[str | os.PathLike[str]]) -> None:
    """Raise OptionError if a result would stand on, in or around a source, which nothing ever changes."""
    output = os.path.realpath(path)
    for source in filter(os.path.exists, sources):
        source_path = os.path.realpath(source)
        if os.path.commonpath([output, source_path]) in (output, source_path):
            raise OptionError(
                f"{path} is the source {os.fspath(source)}, or one lies in the other: sources stay as they are. Give "
                "another place for the result."
            )


@contextmanager
def place_when_done(path: str, stays: bool = True) -> Iterator[str]:
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
    new_folders = [] if os.path.isdir(folder) or not stays else list_missing_folders(folder)
    # named before it is made: an interrupt in between leaves nothing
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
        if str(e.filename or room).startswith(room):  # a full disk does not say whose
            raise OSError(e.errno or errno.EIO, e.strerror or str(e), path) from e
        raise
    finally:
        delete_folder(room)
        for parent in new_folders:
            if os.path.isdir(parent) and not os.listdir(parent):
                os.rmdir(parent)


def delete_folder(folder: str) -> None:
    """Delete a folder, if it is there; an interrupt meanwhile comes when it is gone."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def list_missing_folders(folder: str) -> list[str]:
    """Return a folder and those around it that are not there, the innermost first."""
    out = []
    while not os.path.lexists(folder):
        out.append(folder)
        folder = os.path.dirname(folder)
    return out


def place_result(temporary: str, target: str, stood: bool) -> None:
    """Rename a result to its target. An old result gets its name, to be deleted; one of another process stays."""
    if is_special(target):
        raise OSError(errno.EINVAL, NO_FILE, target)
    if not os.path.exists(temporary):
        raise CheckpointError(f"Nothing was written for {target}.")
    if stood and os.path.lexists(target):
        check_output(target, [], force=True)  # once more, since the work took its time
        exchange_paths(temporary, target)
    else:
        move_to_free_name(temporary, target)


def move_to_free_name(source: str, target: str) -> None:
    """Rename a file or folder to a name that nothing has.

    Raises:
        OutputExistsError: something has come there, from another process.
    """
    try:
        if os.path.isdir(source):
            if os.path.lexists(target):  # renaming would replace an empty folder
                raise FileExistsError
            os.rename(source, target)
            return
        try:
            os.link(source, target)  # which replaces nothing, as renaming does
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            if os.path.lexists(target):
                raise FileExistsError from None
            os.rename(source, target)
    except OSError as e:
        if not os.path.lexists(target):
            raise
        raise OutputExistsError(f"{target} has come meanwhile, from another process, and stays as it is.") from e
