# SPDX-License-Identifier: Apache-2.0
"""Where adapters come from and go to: paths, hub ids with a revision, and what stands beside the files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from graft.config.hub import fetch, not_asked
from graft.config.pair import CONFIG_NAME, SAFETENSORS, TORCH
from graft.config.reading import open_file
from graft.core.errors import CheckpointError
from graft.files.formats import read
from graft.files.neutral import AdapterFile

if TYPE_CHECKING:
    from graft.files.formats import Base

HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
CARD = "README.md"


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


def names_in(wanted: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Return parameters by the names that a checkpoint has for them: its own, or with one prefix more or less.

    Args:
        wanted: paths of modules, of whose weights the names are looked up, or of parameters.
    """
    wanted = list(wanted)
    for prefix in prefixes(wanted, shapes):
        found = {}
        for path in wanted:
            name = path.removeprefix(prefix[1:]) if prefix.startswith("-") else prefix + path
            key = next((k for k in (f"{name}.weight", name) if k in shapes), None)
            if key is not None:
                found[path] = key
        if found:
            return found
    return {}


def prefixes(wanted: list[str], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return what may stand before names: nothing, what the checkpoint has more, or ("-…") has not."""
    if not wanted:
        return []
    first = wanted[0]
    more = sorted(k[: -len(f"{first}.weight")] for k in shapes if k.endswith(f".{first}.weight"))
    parts = first.split(".")
    less = ["-" + ".".join(parts[:i]) + "." for i in range(1, len(parts))]
    return ["", *more, *less]
