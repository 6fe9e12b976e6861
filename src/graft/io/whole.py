# SPDX-License-Identifier: Apache-2.0
"""Gather tensors of which each process holds a part; refuse parts, and empty tensors in their stead."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from operator import attrgetter
from typing import Any

from torch import Tensor

from graft.core.errors import CheckpointError
from graft.core.layer import AdapterLayer
from graft.inject.build import add_adapter
from graft.inject.parts import Parts
from graft.io.entries import Entry
from graft.io.fingerprint import digest
from graft.io.together import Meeting
from graft.storage.parallel import is_plain, is_whole, layout_of, shape_of, whole

CALL = "save_pretrained()"
GATHER = (
    "Gather the whole tensors on all processes (as torch.distributed.checkpoint.state_dict.get_model_state_dict does, "
    "or accelerate's get_state_dict) and pass them as save_pretrained(…, state_dict=…)."
)


def all_here(tensors: Iterable[Tensor]) -> bool:
    """Say whether each tensor is a plain one with numbers, which is quick to see: no part, and no stand-in for one."""
    return all([is_plain(t) and t.numel() for t in tensors])


def gathered(held: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return whole those of these tensors, by name, that are spread over processes. All processes must call this.

    They wait for each other only if there are some.

    Raises:
        CheckpointError: a process is alone, or others hold other tensors.
    """
    spread = {name: t for name, t in held.items() if layout_of(t) is not None}
    spread = {name: spread[name] for name in sorted(spread)}  # in one order everywhere
    ranks = ranks_of(spread.values())
    if len(ranks) > 1:
        shapes = [f"{name} {tuple(shape_of(t))} {t.dtype}" for name, t in spread.items()]
        Meeting(CALL, f"{len(shapes)} tensors ({digest(' '.join(shapes))}) such as {shapes[0]}", ranks)
    return {name: whole(t) for name, t in spread.items()}


def ranks_of(tensors: Iterable[Tensor]) -> list[int]:
    """Return the ranks of the processes that hold these tensors together."""
    found = [layout.ranks(t) for t in tensors if (layout := layout_of(t)) is not None]
    return max(found, key=len, default=[])


def check_entries(held: list[Entry], values: dict[str, Tensor], parts: Parts, adapter: str) -> None:
    """Check the values, by file key, that are to be saved of these entries.

    Raises:
        CheckpointError: one has not the shape that the adapter's tensor has, by what stands there or by the config.
    """
    odd = [e for e in held if is_odd(e.tensor, values[e.file])]
    for layer, group in groupby(odd, attrgetter("layer")):
        shapes = {} if layer is None else shapes_of(layer, adapter, parts)
        for e in group:
            check_value(e.memory, values[e.file], e.tensor, adapter, shapes.get((e.container, e.path)))


def is_odd(tensor: Tensor, value: Tensor) -> bool:
    """Say whether a tensor is empty in the stead of another, or a value has another shape than it."""
    if value is tensor and is_plain(tensor):
        return not is_whole(tensor)
    layout = layout_of(tensor)
    if layout is not None:
        return value.shape != layout.shape(tensor)
    return value.shape != tensor.shape or not is_whole(tensor)


def check_value(key: str, value: Tensor, tensor: Tensor, adapter: str, shape: Any = None) -> None:
    """Check a value for `tensor`, whose shape is `shape` if that is known; else its own, unless it is a part itself."""
    if shape is None and (layout_of(tensor) is not None or is_whole(tensor)):
        shape = shape_of(tensor)
    if value.shape == shape or (shape is None and value.numel()):
        return
    wanted = "" if shape is None else f" and not {tuple(shape)}"
    raise CheckpointError(
        f"'{key}' of adapter '{adapter}' has the shape {tuple(value.shape)}{wanted}: it is a part of the tensor, or "
        f"stands in for it. {GATHER}"
    )


def shapes_of(layer: AdapterLayer, adapter: str, parts: Parts) -> dict[tuple[str, str], Any]:
    """Return the shapes that an adapter's tensors have on a layer by the config, whatever stands there now."""
    method, spare = layer.methods[adapter], AdapterLayer(layer.site, layer.call)
    shared = {} if parts.shared is None else parts.shared.attached()
    add_adapter(spare, type(method)(layer.site, method.cfg, adapter), shared, on_meta=True, upcast=False)
    return {(slot.container, slot.path): slot.tensor.shape for slot in spare.slots(adapter)}
