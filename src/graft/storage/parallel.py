# SPDX-License-Identifier: Apache-2.0
# Supported inside: rooms may import this module.
"""Layouts of tensors that are spread over processes: gathering them, and writing whole values into them.

A layout has the functions of `Distributed`. All code that reads or writes adapters asks `layout_of`.

Saving, loading, hot-swapping and combining gather one tensor at a time, in sorted order on all processes, and only the
adapter's tensors.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from graft.core.containers import Slot, parameter_dict
from graft.core.wrappers import (
    INNER_ATTRIBUTES,
    MANAGED,
    collect_parameters,
    find_inner_module,
    find_unsharded_class,
    walk_unwrapped,
)
from graft.kernels.versions import write_all
from graft.storage.flat import FlatPiece, find_flat_piece, find_flat_place, sendable

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement

M = TypeVar("M", bound=nn.Module)


def processes() -> int:
    """Return the number of processes in the default group of torch.distributed; 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class Distributed:
    """The layout of DTensors, as FSDP2 and tensor parallelism make them."""

    name, has_gradients, writable = "DTensor", True, True

    def ranks(self, t: Any) -> list[int]:
        """Return the ranks of the processes in the tensor's mesh."""
        return t.device_mesh.mesh.flatten().tolist()

    def shape(self, t: Tensor) -> torch.Size:
        """Return the tensor's shape: that of a DTensor is the whole one."""
        return t.shape

    def gather(self, t: Any) -> Tensor:
        """Return the whole tensor, on the device of the DTensor. Every process of the mesh must call this.

        A DTensor on another device than its mesh's is moved there for sending, and the result back.
        """
        kind = t.device_mesh.device_type
        gathered: Tensor = (t if t.device.type in (kind, "meta") else t.to(kind)).full_tensor()
        return gathered.to(t.device)

    def fill(self, t: Tensor, value: Tensor) -> None:
        """Copy this process's part of a whole value into the DTensor, cast to its dtype.

        No process waits for another.
        """
        t.copy_(shard_like(value.to(dtype=t.dtype), t))


class OfAll:
    """The base of layouts that spread a tensor over all processes."""

    def ranks(self, t: Tensor) -> list[int]:
        """Return the ranks of all processes of the default group; [0] without a group."""
        return list(range(dist.get_world_size())) if dist.is_initialized() else [0]


class FlatParameter(OfAll):
    """The layout of tensors that are slices of a flat parameter, as FSDP1 makes them."""

    name, has_gradients, writable = "FSDP1", False, False

    def shape(self, t: Tensor) -> torch.Size:
        """Return the shape of the whole tensor."""
        return find_flat_piece(t).shape  # type: ignore[union-attr]

    def gather(self, t: Tensor) -> Tensor:
        """Return the whole tensor in new memory. Every process must call this."""
        return find_flat_piece(t).gather()  # type: ignore[union-attr]

    def fill(self, t: Tensor, value: Tensor) -> None:
        """Copy this process's part of a whole value into the flat parameter in place."""
        find_flat_piece(t).fill(value)  # type: ignore[union-attr]


class Zero3(OfAll):
    """The layout of DeepSpeed's ZeRO-3: between calls a parameter is empty, or a copy that DeepSpeed keeps because it
    is small.
    """

    name, has_gradients, writable = "ZeRO-3", False, False

    def shape(self, t: Any) -> torch.Size:
        """Return the shape that DeepSpeed noted for the whole tensor, `ds_shape`, as a torch.Size."""
        return torch.Size(t.ds_shape)

    def gather(self, t: Tensor) -> Tensor:
        """Return a detached copy of the whole tensor. Every process must call this."""
        import deepspeed

        with deepspeed.zero.GatheredParameters([t]):
            return t.detach().clone()

    def fill(self, t: Tensor, value: Tensor) -> None:
        """Gather the parameter, copy the whole value into it, and let DeepSpeed spread the values of process 0.

        Every process must call this.
        """
        import deepspeed

        with deepspeed.zero.GatheredParameters([t], modifier_rank=0):
            t.data.copy_(value)


# `has_gradients`: the gradient of a tensor has the layout as well. `writable`: computing with the tensors, and copying
# into them, acts on all parts alike.
Layout = Distributed | FlatParameter | Zero3
DISTRIBUTED, FLAT, ZERO3 = Distributed(), FlatParameter(), Zero3()


def has_no_layout(t: Tensor) -> bool:
    """Return True if a tensor is exactly a `Tensor` or `nn.Parameter`, no view, and has an empty `__dict__`: a quick
    check.

    A False does not tell that it has a layout.
    """
    return type(t) in (nn.Parameter, Tensor) and t._base is None and not t.__dict__


def layout_of(t: Tensor) -> Layout | None:
    """Return the layout of a tensor that processes share; None if this process has all of it.

    A DTensor has DISTRIBUTED, a tensor with DeepSpeed's `ds_id` ZERO3, and a piece of a sharded flat parameter of FSDP1
    FLAT.
    """
    if has_no_layout(t):
        return None
    if is_sharded(t):
        return DISTRIBUTED
    if hasattr(t, "ds_id"):
        return ZERO3
    return FLAT if find_flat_piece(t) is not None else None


def is_sharded(t: Tensor) -> TypeGuard[DTensor]:
    """Return True if the tensor's class has the name DTensor, which imports nothing."""
    return type(t).__name__ == "DTensor"


def local(t: Tensor) -> Tensor:
    """Return this process's piece of a DTensor; other tensors unchanged."""
    return t.to_local() if is_sharded(t) else t


def find_master_ids(parameters: Iterable[object]) -> set[int]:
    """Return the ids of those parameters that an optimizer of DeepSpeed trains through a float32 copy.

    A parameter of ZeRO-1 and ZeRO-2 is known by the attribute `_hp_mapping`, even if it is None. Of the others one with
    `_z3_optimizer` (ZeRO-3) adds the ids of all parameters in that optimizer's `fp16_groups`, also of those not passed.
    """
    ids, optimizers = set(), {}
    for p in parameters:
        if hasattr(p, "_hp_mapping"):
            ids.add(id(p))
        elif hasattr(p, "_z3_optimizer"):
            optimizers[id(p._z3_optimizer)] = p._z3_optimizer
    return ids | {id(p) for o in optimizers.values() for group in o.fp16_groups for p in group}


def gather_master_values(t: Tensor) -> Tensor:
    """Return a copy of the whole float32 values that an optimizer of DeepSpeed trains for t, in the shape of t.

    Every process must call this.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    values: Tensor = safe_get_full_fp32_param(t)
    return values.detach().reshape(find_whole_shape(t)).clone()


def is_whole(t: Tensor) -> bool:
    """Return True if a tensor holds all its values: not emptied by ZeRO-3, and no slice of FSDP1's flat parameter.

    A DTensor counts as whole. A tensor of floats without numbers is not whole. An original parameter that FSDP1 has
    flattened is whole only with NO_SHARD, and if its flat parameter is found.
    """
    if not t.numel() and t.is_floating_point():
        return False
    if has_no_layout(t):
        return True
    if "_fsdp_flattened" in t.__dict__:
        return find_flat_place(t) is not None and find_flat_piece(t) is None  # NO_SHARD flattens, and keeps it whole
    return find_flat_piece(t) is None


def find_whole_shape(t: Tensor) -> torch.Size:
    """Return the shape of the whole tensor, whatever its layout. Nothing is gathered."""
    layout = layout_of(t)
    return t.shape if layout is None else layout.shape(t)


@torch.no_grad()
def gather_tensor(t: Tensor) -> Tensor:
    """Return a tensor whole, without gradient; itself if this process has all of it. Every process must call this."""
    layout = layout_of(t)
    return t if layout is None else layout.gather(t.detach() if layout is DISTRIBUTED else t)


@torch.no_grad()
def write_whole(t: Tensor, value: Tensor) -> None:
    """Write a value, which every process has whole, into a tensor in place. Every process must call this.

    A float32 copy in a DeepSpeed optimizer is overwritten as well, else the next step would undo the write.
    """
    layout = layout_of(t)
    if layout is None:
        write_all([(t, value)])
    else:
        layout.fill(t, value)
    if id(t) in find_master_ids([t]):
        from deepspeed.utils import safe_set_full_fp32_param

        # else the next step undoes the write
        safe_set_full_fp32_param(t, value.to(device=t.device, dtype=torch.float32))


@torch.no_grad()
def write_all_whole(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Write whole values into tensors in place. Every process must call this, with the pairs in one order.

    Pairs (tensor, value) with plain tensors are written first, all at once. The others, sharded or with a master copy
    of DeepSpeed, are written one by one by `write_whole`.
    """
    local = [p for p in pairs if has_no_layout(t := p[0]) or (layout_of(t) is None and not find_master_ids([t]))]
    if local:
        write_all(local)
    for t, value in pairs if len(local) < len(pairs) else ():
        if layout_of(t) is not None or find_master_ids([t]):
            write_whole(t, value)


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """Return `value`, which every process has whole, as a DTensor sharded like `like`, detached and on its device.

    Unchanged if `like` is no DTensor or `value` is one already. No process waits for another.
    """
    if not is_sharded(like) or is_sharded(value):
        return value
    mesh, placements = like.device_mesh, like.placements
    value = value.detach().to(like.device if not like.is_meta else mesh.device_type)
    return shard_value(value, mesh, placements)


def shard_value(value: Tensor, mesh: dist.DeviceMesh, placements: Sequence[Placement]) -> Tensor:
    """Return a DTensor of `value`, which every process has whole: each process cuts out its part without waiting.

    Where `distribute_tensor` has no `src_data_rank` (torch 2.6), it is first wrapped as replicated, and then
    redistributed.
    """
    from torch.distributed import tensor  # imported here, as it is rarely needed

    if "src_data_rank" in inspect.signature(tensor.distribute_tensor).parameters:
        return tensor.distribute_tensor(value, mesh, placements, src_data_rank=None)
    copies = [tensor.Replicate()] * mesh.ndim  # in torch 2.6 distribute_tensor always sends
    return tensor.DTensor.from_local(value, mesh, copies, run_check=False).redistribute(mesh, placements)


@contextmanager
def gather_slots(slots: Iterable[Slot]) -> Iterator[None]:
    """Replace tensors in these slots by whole ones within the block, for reading. Every process must call this.

    Only tensors with a layout are replaced, by new detached Parameters with the same requires_grad. The old ones are
    put back at the end, after an error too; changes to the whole ones are lost.
    """
    before = []
    try:
        for slot in slots:
            t = slot.tensor
            if layout_of(t) is not None:
                container = parameter_dict(slot.owner, slot.attribute)  # DeepSpeed has put another dictionary there
                before.append((container, slot.attribute, t))
                container[slot.attribute] = nn.Parameter(gather_tensor(t).detach(), t.requires_grad)
        yield
    finally:
        for container, attribute, t in before:
            container[attribute] = t


def strip_inner_wrappers(name: str) -> str:
    """Return a tensor's name as a file has it: without the attributes of FSDP, torch.compile and checkpoint wrappers.

    Wrappers around a whole model ("module.") stay in the name.
    """
    if "_wrapped_module" not in name and "_orig_mod" not in name:  # most names have no wrapper
        return name
    return re.sub(rf"(?:^|(?<=\.))(?:{'|'.join(INNER_ATTRIBUTES)})\.", "", name)


def find_parameters_below(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a module and of its children by path, each tensor once, under its first path.

    Wrappers' names are left out of the paths.
    """
    parameters: dict[int, tuple[str, Tensor]] = {}
    for path, m in walk_unwrapped(module):
        for name, p in collect_parameters(m).items():
            parameters.setdefault(id(p), (f"{path}.{name}" if path else name, p))
    return dict(parameters.values())


@torch.no_grad()
def gather_numbers(t: Any, places: list[int]) -> list[float]:
    """Return the numbers at these flat positions of the whole tensor. Every process with a part must call this.

    For FSDP1 and DTensors the processes send only these numbers, as float64 sums; copies on several processes count as
    their mean. Other tensors, and DTensors with a placement named "…Strided…", are gathered whole; their numbers are
    picked then.
    """
    piece, layout, groups = find_flat_piece(t), layout_of(t), [None]
    if piece is not None:
        numbers, sent = pick_piece_numbers(piece, places), piece.flat
    elif layout is DISTRIBUTED and not any("Strided" in type(p).__name__ for p in t.placements):
        numbers, sent = pick_shard_numbers(t, places), t
        groups = [t.device_mesh.get_group(dim) for dim in range(t.device_mesh.ndim)]
    else:
        flat = gather_tensor(t).reshape(-1)
        return [float(flat[place]) for place in places]
    counts = torch.tensor([[0.0, 0.0] if v is None else [v, 1.0] for v in numbers], dtype=torch.float64)
    counts = counts.to(sendable(sent))
    for group in groups:
        dist.all_reduce(counts, group=group)
    return (counts[:, 0] / counts[:, 1]).tolist()


def pick_piece_numbers(piece: FlatPiece, places: list[int]) -> list[float | None]:
    """Return the numbers at these flat positions of the whole tensor that this process has; None for each of another
    process.
    """
    info, local = piece.flat._shard_param_infos[piece.number], piece.numbers
    begin = info.intra_param_start_idx if info.in_shard else 0
    return [float(local[p - begin]) if begin <= p < begin + len(local) else None for p in places]


def pick_shard_numbers(t: DTensor, places: list[int]) -> list[float | None]:
    """Return the numbers of a DTensor at these flat positions of the whole tensor, as floats; None for each that this
    process does not have.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    size, offset = compute_local_shape_and_global_offset(t.shape, t.device_mesh, t.placements)
    piece, out = t.to_local(), []
    for place in places:
        inner = [int(i) - o for i, o in zip(torch.unravel_index(torch.tensor(place, device="cpu"), t.shape), offset)]
        is_local = all(0 <= i < n for i, n in zip(inner, size))
        out.append(float(piece[tuple(inner)]) if is_local else None)
    return out


# beginnings of the names of attributes that FSDP2 adds to modules
NOTES = (MANAGED, "_fsdp_use_orig_params", "__composable_api_state_key")


def copy_unwrapped(module: M, values: dict[str, Tensor]) -> M:
    """Return a copy of a module without hooks, wrappers, classes and marks of layouts, with `values` as tensors, by
    name.

    Children are copied as well, with the values below their names. Parameters are new, detached, with the old
    requires_grad; those that `values` lacks share memory with the module's. Attributes that are lists hold the new
    parameters in place of the old ones. Buffers and other attributes are shared. Of a wrapper the module inside is
    copied, with the class from before `fully_shard`; no `__init__` runs.
    """
    bare: nn.Module = module
    while (inner := find_inner_module(bare)) is not None:
        bare = inner
    kind: Any = find_unsharded_class(bare)
    copy: M = kind.__new__(kind)
    parameters = collect_parameters(bare)
    for name, value in bare.__dict__.items():
        if name not in parameters and not name.startswith(NOTES):
            copy.__dict__[name] = type(value)() if "hooks" in name and isinstance(value, dict) else value
    copy.__dict__.update(_parameters=dict.fromkeys(bare._parameters), _buffers=dict(bare._buffers), _modules={})
    for name, p in parameters.items():
        copy._parameters[name] = nn.Parameter(values.get(name, p).detach(), p.requires_grad)
    copies = {id(p): copy._parameters[name] for name, p in parameters.items()}
    for name, value in copy.__dict__.items():
        if isinstance(value, list):  # a recurrent layer has its parameters in one as well
            copy.__dict__[name] = [copies.get(id(item), item) for item in value]
    for name, child in bare._modules.items():
        below = {k.removeprefix(f"{name}."): v for k, v in values.items() if k.startswith(f"{name}.")}
        copy._modules[name] = None if child is None else copy_unwrapped(child, below)
    return copy
