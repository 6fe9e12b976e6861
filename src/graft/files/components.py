# SPDX-License-Identifier: Apache-2.0
"""The parts of a pipeline that an adapter is for: in front of paths in one file, or folders of their names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from graft.files.bases import COMPONENTS
from graft.files.neutral import AdapterFile


def parts_of(paths: Iterable[str]) -> set[str]:
    """Return the parts of a pipeline that paths begin with; empty if one begins otherwise."""
    first = {path.partition(".")[0] for path in paths}
    parts = {part for part in first if part.rstrip("_0123456789") in COMPONENTS}
    return parts if parts == first else set()


def split(adapter: AdapterFile) -> dict[str, AdapterFile]:
    """Return an adapter for each part of a pipeline, without the part's name; empty if it is for one model."""
    paths = [*adapter.modules, *adapter.full, *adapter.rows]
    out: dict[str, AdapterFile] = {}
    for part in sorted(parts_of(paths)):
        start = f"{part}."

        def own(held: dict, start: str = start) -> dict:
            return {path.removeprefix(start): value for path, value in held.items() if path.startswith(start)}

        out[part] = replace(
            adapter, modules=own(adapter.modules), full=own(adapter.full), rows=own(adapter.rows),
            unread=[] if out else adapter.unread, config={}, selected=None,
        )  # fmt: skip
    return out
