# SPDX-License-Identifier: Apache-2.0
"""Refuse parts of tensors: the shard that one process of a model holds, or an empty tensor in its stead."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graft.core.errors import CheckpointError
from graft.core.layer import AdapterLayer
from graft.inject.build import add_adapter
from graft.inject.parts import Parts
from graft.io.entries import Entry
from graft.storage.parallel import is_whole

GATHER = (
    "Gather the whole tensors on all processes (as torch.distributed.checkpoint.state_dict.get_model_state_dict does, "
    "or accelerate's get_state_dict) and pass them as save_pretrained(…, state_dict=…)."
)


def check_entries(held: list[Entry], values: dict[str, Tensor], parts: Parts, adapter: str) -> None:
    """Check the values, by file key, that are to be saved of the entries of one layer.

    Raises:
        CheckpointError: one has not the shape that the adapter's tensor has, by what stands there or by the config.
    """
    odd = [
        e
        for e in held
        if not is_whole(e.tensor) or ((value := values[e.file]) is not e.tensor and value.shape != e.tensor.shape)
    ]
    shapes = shapes_of(odd[0].layer, adapter, parts) if odd and odd[0].layer is not None else {}
    for entry in odd:
        check_value(entry.memory, values[entry.file], entry.tensor, adapter, shapes.get((entry.container, entry.path)))


def check_value(key: str, value: Tensor, tensor: Tensor, adapter: str, shape: Any = None) -> None:
    """Check a value for `tensor`, whose shape is `shape` if that is known; else its own, unless it is a part itself."""
    if shape is None and is_whole(tensor):
        shape = tensor.shape
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
