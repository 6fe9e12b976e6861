# SPDX-License-Identifier: Apache-2.0
"""Equal adapters on all processes that compute one model in pieces: each holds every adapter whole."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from graft.core.errors import CheckpointError
from graft.core.random import set_states, states
from graft.storage import group_of
from graft.storage.flat import sendable


def group_in(modules: Iterable[nn.Module]) -> Any:
    """Return the group of processes that compute a model in pieces; None if no other process has a part in it."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    return next((g for m in modules if (g := group_of(m)) is not None), None)


def draw_alike(modules: Iterable[nn.Module]) -> None:
    """Have all processes of a model's group draw from now on what its first process draws."""
    group = group_in(modules)
    if group is None:
        return
    first = dist.get_global_rank(group, 0)
    alike = []
    for state in states():
        sent = state.to(sendable(state, group), copy=True)
        dist.broadcast(sent, first, group=group)
        alike.append(sent.cpu())
    set_states(alike)


def agree(job: Any) -> None:
    """Give an Injection's new tensors the values of the group's first process, whatever each has drawn.

    Raises:
        CheckpointError: the processes have loaded different values.
    """
    group = group_in(job.tree.modules.values())
    tensors = [] if group is None else [t for t in tensors_of(job) if not t.is_meta and t.numel()]
    for device in dict.fromkeys(t.device for t in tensors):
        here = [t for t in tensors if t.device == device]
        data = torch.cat([t.detach().reshape(-1).contiguous().view(torch.uint8) for t in here])
        if job.values is not None:
            check_equal(data, job.adapter, group)
            continue
        dist.broadcast(data, dist.get_global_rank(group, 0), group=group)
        parts = data.split([t.numel() * t.itemsize for t in here])
        for t, part in zip(here, parts):
            t.data.copy_(part.clone().view(t.dtype).view(t.shape))


def tensors_of(job: Any) -> Iterator[Tensor]:
    """Yield the tensors of an Injection's adapter, each once, in the same order on all processes."""
    seen: set[int] = set()
    shared = [slot.tensor for slot in job.shared.slots(job.adapter)]
    own = [t for layer in job.layers.values() for _, t in layer.tensors(job.adapter, transient=True)]
    rows = [t for w in job.wrappers.values() for t in (slot.tensor for slot in w.slots(job.adapter))]
    prompt = [] if job.prompt is None else [*job.prompt.parameters(), *job.prompt.buffers()]
    for t in (*shared, *own, *rows, *prompt):
        if id(t) not in seen and type(t).__name__ != "DTensor":
            seen.add(id(t))
            yield t


def check_equal(data: Tensor, adapter: str, group: Any) -> None:
    own: int = zlib.crc32(data.cpu().numpy())  # type: ignore[arg-type]  # an array is a buffer
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, own, group=group)
    other = [rank for rank, digest in enumerate(found) if digest != found[0]]
    if other:
        raise CheckpointError(
            f"Adapter '{adapter}' has other values on process {other[0]} of its tensor parallel group than on process "
            "0: load the same file on all of them."
        )
