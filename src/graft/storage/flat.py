# SPDX-License-Identifier: Apache-2.0
"""Tensors in FSDP1's flat parameters: many tensors in one row of numbers, with a part on each process."""

from __future__ import annotations

import gc
import weakref
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

_PLACES: dict[int, tuple[Any, int]] = {}  # id of an original parameter → weak reference to its flat one, number


class FlatPiece(NamedTuple):
    """The numbers of one tensor of a flat parameter that are on this process."""

    flat: Any
    number: int  # of the tensor in it

    @property
    def shape(self) -> torch.Size:
        """The shape of the whole tensor."""
        return self.flat._shapes[self.number]

    @property
    def numbers(self) -> Tensor:
        """The numbers of this process themselves, (n,), a view of the flat parameter's `_local_shard` or data: writing
        to them writes to the parameter.

        Empty if it has none.
        """
        info = self.flat._shard_param_infos[self.number]
        shard: Tensor = getattr(self.flat, "_local_shard", self.flat).data
        begin = info.offset_in_shard if info.in_shard else 0
        return shard[begin : begin + (info.numel_in_shard if info.in_shard else 0)]

    def gather(self) -> Tensor:
        """Return the whole tensor in new memory, on the device of the piece.

        Every process of the default group must call this, also with an empty piece: sizes are gathered first, then
        pieces padded to the largest.

        It is gathered where the piece is, but a CPU piece without gloo on the accelerator (`sendable`). With
        HYBRID_SHARD the first copy counts.
        """
        local, n = self.numbers, self.shape.numel()
        sizes = [torch.zeros(1, dtype=torch.int64, device=sendable(local)) for _ in range(dist.get_world_size())]
        dist.all_gather(sizes, torch.tensor([len(local)], dtype=torch.int64, device=sendable(local)))
        counts = [int(size) for size in sizes]
        padded = torch.zeros(max(counts), dtype=local.dtype, device=sendable(local))
        padded[: len(local)] = local
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        # with HYBRID_SHARD the pieces repeat: the first ones make up the whole
        return torch.cat([part[:count] for part, count in zip(parts, counts)])[:n].view(self.shape).to(local.device)

    def fill(self, value: Tensor) -> None:
        """Copy this process's part of a whole value into the parameter in place; does nothing if the process has no
        part.
        """
        info = self.flat._shard_param_infos[self.number]
        if info.in_shard:
            begin = info.intra_param_start_idx
            self.numbers.copy_(value.reshape(-1)[begin : begin + info.numel_in_shard])


def find_flat_piece(t: Tensor) -> FlatPiece | None:
    """Return the piece of a tensor that FSDP1 has in a sharded flat parameter; None for other tensors, and with
    NO_SHARD.

    With use_orig_params=False the tensor is a view of the flat parameter; raises LookupError if no tensor begins at its
    offset. With True it is an original parameter with `_fsdp_flattened`, and `find_flat_place` may search all objects
    of the process for the flat one; None without one.
    """
    flat = t._base
    if is_flat(t):  # use_orig_params=False
        number = find_tensor_number(flat, int(t.storage_offset()))
    elif "_fsdp_flattened" in t.__dict__ and (place := find_flat_place(t)) is not None:  # use_orig_params=True
        flat, number = place
    else:
        return None
    return FlatPiece(flat, number) if getattr(flat, "_shard_param_infos", None) else None  # else NO_SHARD


def is_flat(t: Tensor) -> bool:
    """Return True if a tensor is a view of a flat parameter (its base has `_is_flat_param`), which trains as a whole
    (use_orig_params=False).
    """
    return t._base is not None and hasattr(t._base, "_is_flat_param")


def trains(t: Tensor) -> bool:
    """Return True if a tensor gets gradients; a view of a flat parameter does if the flat parameter does."""
    return bool(t._base.requires_grad if is_flat(t) else t.requires_grad)  # type: ignore[union-attr]


def find_tensor_number(flat: Any, offset: int) -> int:
    """Return the number of the tensor that begins at `offset` in a flat parameter; paddings are not counted.

    Raises LookupError if no tensor begins there.
    """
    at = number = 0
    for numel, is_padding in zip(flat._numels_with_padding, flat._is_padding_mask):
        if not is_padding:
            if at == offset:
                return number
            number += 1
        at += numel
    raise LookupError(f"FSDP's flat parameter has no tensor that begins at {offset}.")


def find_flat_place(p: Tensor) -> tuple[Any, int] | None:
    """Return the flat parameter that has taken in an original parameter, and its number there; None if there is none.

    FSDP1 keeps no reference from one to the other. If the cache `_PLACES` has no valid answer, it is cleared, and
    filled for all parameters from all objects of the garbage collector. That is slow.
    """
    place = look_up_place(p)
    if place is None:
        _PLACES.clear()
        for flat in gc.get_objects():
            if type(flat) is nn.Parameter and getattr(flat, "_is_flat_param", False):
                for number, original in enumerate(getattr(flat, "_params", None) or ()):
                    _PLACES[id(original)] = weakref.ref(flat), number
        place = look_up_place(p)
    return place


def look_up_place(p: Tensor) -> tuple[object, int] | None:
    """Return the cached flat parameter and number for a parameter.

    None if nothing is cached, the flat parameter is gone, or it holds another parameter at this number by now.
    """
    reference, number = _PLACES.get(id(p), (lambda: None, 0))
    flat = reference()
    return (flat, number) if flat is not None and flat._params[number] is p else None


def sendable(t: Tensor, group: dist.ProcessGroup | None = None) -> torch.device:
    """Return a device for sending this tensor with the group's backend.

    It is the tensor's device if that is no CPU or the backend is gloo, else the accelerator; the CPU without one.

    group: None is the default group.
    """
    if "gloo" in dist.get_backend(group) or t.device.type != "cpu":
        return t.device
    device = torch.accelerator.current_accelerator()
    return t.device if device is None else device
