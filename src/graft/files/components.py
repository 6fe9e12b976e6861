# SPDX-License-Identifier: Apache-2.0
"""The parts of a pipeline that an adapter is for: in front of paths in one file, or folders of their names."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from graft import BaseModelMismatchError
from graft.files.bases import COMPONENTS
from graft.files.names import check_shapes
from graft.files.neutral import AdapterFile

if TYPE_CHECKING:
    from graft.files.formats import Base

T = TypeVar("T")


def parts_of(paths: Iterable[str]) -> set[str]:
    """Return the parts of a pipeline that paths begin with; empty if one begins otherwise."""
    first = {path.partition(".")[0] for path in paths}
    parts = {part for part in first if part.rstrip("_0123456789") in COMPONENTS}
    return parts if parts == first else set()


def is_pipeline(base: Base | None) -> bool:
    """Return True if a base is a pipeline's folder: others may have modules of such names, too, as GPT-2 has."""
    return base is not None and str(base.config.get("_class_name", "")).endswith("Pipeline")


def split(adapter: AdapterFile) -> dict[str, AdapterFile]:
    """Return an adapter for each part of a pipeline, without the part's name; empty if it is for one model."""
    paths = [*adapter.modules, *adapter.full, *adapter.rows] if adapter.pipeline else []
    out: dict[str, AdapterFile] = {}
    for part in sorted(parts_of(paths)):
        start = f"{part}."

        def own(by_path: dict[str, T], start: str = start) -> dict[str, T]:
            return {path.removeprefix(start): value for path, value in by_path.items() if path.startswith(start)}

        out[part] = replace(
            adapter, modules=own(adapter.modules), full=own(adapter.full), rows=own(adapter.rows),
            unread=[] if out else adapter.unread, config={}, selected=None, pipeline=False,
        )  # fmt: skip
        out[part].method = method_of(out[part], adapter.method)
    return out


def part_for(adapter: AdapterFile, base: Base) -> AdapterFile:
    """Return the part of a pipeline's adapter that one model is, by names and shapes.

    It is the adapter itself if it is for one model, or if not exactly one part fits.
    """
    known, fitting = set(base.modules), []
    for part in split(adapter).values():
        with suppress(BaseModelMismatchError):
            check_shapes(part.low_rank, part, base)
            fitting += [part] if known.issuperset(part.modules) else []
    return fitting[0] if len(fitting) == 1 else adapter


def method_of(adapter: AdapterFile, otherwise: str) -> str:
    """Return the method of all modules, if it is one."""
    methods = {module.method for module in adapter.modules.values()}
    return methods.pop() if len(methods) == 1 else otherwise


def joined(parts: dict[str, AdapterFile], path: str) -> AdapterFile:
    """Return the adapters of a pipeline's parts as one."""
    out = replace(next(iter(parts.values())), path=path, modules={}, full={}, rows={}, shared={}, unread=[], config={},
                  selected=None, pipeline=True)  # fmt: skip
    for part, of_part in parts.items():
        for name in ("modules", "full", "rows", "shared"):
            getattr(out, name).update({f"{part}.{key}": value for key, value in getattr(of_part, name).items()})
        out.unread += [f"{part}: {key}" for key in of_part.unread]
    return out
