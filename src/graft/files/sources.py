# SPDX-License-Identifier: Apache-2.0
"""Where adapters come from and go to: paths, hub ids with a revision, and what stands beside the files."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from graft import CheckpointError
from graft.config.hub import fetch, not_asked
from graft.config.pair import CONFIG_NAME, SAFETENSORS, TORCH
from graft.config.reading import open_file, read_object
from graft.files.base import Known, Skeleton, base_files
from graft.files.bases import base_of
from graft.files.errors import BaseNeededError
from graft.files.formats import read
from graft.files.neutral import AdapterFile

if TYPE_CHECKING:
    from graft.files.formats import Base

HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
BASE_ID = re.compile(r"(?P<repo>([\w.-]+/)?[\w.-]+)(@(?P<revision>[\w./-]+))?")  # old models have no owner: gpt2
BASE_FIELDS = ("base_model_name_or_path", "model_name", "model")  # of PEFT and torchtune, AdapterHub, MLX
CARD = "README.md"
Result = TypeVar("Result")


def adapter_at(source: str, base: Base | None = None) -> AdapterFile:
    """Read an adapter from a file, a folder, or the hub (`user/repo@rev`), which is asked for nothing else.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    return read(local(source), base)


def local(source: str) -> str:
    """Return the path of an adapter: the source itself, or where the hub's files are kept."""
    named = None if os.path.exists(source) else HUB_ID.fullmatch(source)
    if named is None:
        return source
    hub = {"revision": named["revision"]} if named["revision"] else {}
    config = fetch(named["repo"], CONFIG_NAME, **hub)
    if config is None or all(fetch(named["repo"], name, **hub) is None for name in (SAFETENSORS, TORCH)):
        raise CheckpointError(f"There is no adapter at '{source}'{not_asked(named['repo'])}.")
    fetch(named["repo"], CARD, **hub)
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


def name_base(adapter: str) -> str | None:
    """Return the base model that an adapter's adapter_config.json names, as `find_base` takes it; None: there is none.

    A path on another machine (//host/share) is no name: looking for it would log in there.
    """
    path = os.path.join(adapter, CONFIG_NAME)
    config = read_object(path) if os.path.isfile(path) else {}
    name = next((name for field in BASE_FIELDS if isinstance(name := config.get(field), str) and name), None)
    return None if name is None or name.startswith(("//", "\\\\")) else name


def need_base(adapter: str, base: str | None) -> str:
    """Return the path of `base`, or of the base model that the adapter names.

    Raises:
        BaseNeededError: `base` is None, and the adapter names none.
        CheckpointError: it is not here.
    """
    name = name_base(adapter) if base is None else base
    if name is None:
        raise BaseNeededError(f"{adapter} names no base model. Give one with --base: a folder or a hub id.")
    return find_base(name)


def with_base(adapter: str, base: str | None, run: Callable[[Known | None], Result]) -> Result:
    """Return `run` of the model `base`. If `base` is None, `run` gets the adapter's own base if it needs one.

    Raises:
        BaseNeededError: `run` needs a base, and there is none.
        CheckpointError: the base is not here, or damaged. Errors of `run` pass through.
    """
    if base is not None:
        return run(base_of(find_base(base)))
    try:
        return run(None)
    except BaseNeededError:
        if name_base(adapter) is None:
            raise
    return run(base_of(need_base(adapter, None)))


def own_names(adapter: str) -> Skeleton | None:
    """Return names and shapes of the base that an adapter names; None if it names none, or its files are not here."""
    try:
        name = name_base(adapter)
        base = None if name is None else base_files(find_base(name))
    except CheckpointError:
        return None
    return None if base is None else Skeleton(base.path, base.config, base.shapes, [*base.modules])


def licence_in(folder: str) -> str | None:
    """Return the licence that a card names; None if there is no card, or it names none."""
    path = os.path.join(folder, CARD)
    if not os.path.isfile(path):
        return None
    with open_file(path) as f:
        text = f.read(100_000).decode("utf-8-sig", "replace")
    head = re.match(r"---\r?\n(.*?)\n---", text, re.DOTALL)
    found = head and re.search(r"^license:\s*['\"]?([\w.+-]+)", head[1], re.MULTILINE)
    return found[1] if found else None
