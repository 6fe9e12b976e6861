# SPDX-License-Identifier: Apache-2.0
"""Checks of a file's tensors, before any of them is put into a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np  # torch reads no read-only bytes
import torch
from torch import Tensor

from graft.core.errors import CheckpointError, NonFiniteError, join_some
from graft.storage.parallel import is_sharded

NARROW = tuple(getattr(torch, name) for name in dir(torch) if name.startswith("float8_"))  # dtypes without arithmetic
KNOWN = {torch.float16, torch.bfloat16, torch.float32, torch.float64, *NARROW, torch.bool, torch.uint8, torch.int8,
         torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32}  # fmt: skip
SMALL, TOGETHER = 2**14, 2**20  # numbers of a tensor, and of several that are summed up in one pass


def check_tensors(tensors: dict[str, Tensor], path: str, allow_nonfinite: bool = False) -> None:
    """Raise if one of the tensors cannot be loaded into an adapter.

    All dtypes and layouts are checked before any numbers.

    Args:
        path: where they come from, for errors.
        allow_nonfinite: accept NaN and infinite numbers; they are not searched for.

    Raises:
        CheckpointError: one is sparse, nested, quantized or complex, on the meta device, of an unusual dtype, or
            repeats its numbers.
        NonFiniteError: one holds NaN or an infinite number.
    """
    for name, t in tensors.items():
        why = describe_fault(t)
        if why is not None:
            raise CheckpointError(f"'{name}' in {path} {why}. Save it as a plain tensor of real numbers.")
    if allow_nonfinite:
        return
    if bad := find_nonfinite(tensors):
        raise NonFiniteError(
            f"NaN or infinite numbers are in {join_some(bad, 4)}, of {path}: training has diverged, or the file is "
            "damaged. "
            "Pass allow_nonfinite=True to load it all the same."
        )


def describe_fault(t: Tensor) -> str | None:
    """Return why a tensor cannot be loaded into an adapter, such as "is sparse or nested"; None if it can.

    Other faults: a dtype that is not known, the meta device, memory with repeated numbers.
    """
    if t.dtype not in KNOWN:
        return "is quantized" if t.is_quantized else f"has dtype {t.dtype}"
    if t.layout is not torch.strided or t.is_nested:
        return "is sparse or nested"
    if t.is_meta:
        return "is on the meta device, without values"
    repeats = not t.is_contiguous() and t.numel() * t.itemsize > t.untyped_storage().nbytes()
    return "repeats its numbers" if repeats else None


@torch.no_grad()
def find_nonfinite(tensors: dict[str, Tensor]) -> list[str]:
    """Return the names of the floating tensors that hold NaN or an infinite number.

    Sums find suspects first; only those are looked at one by one. Sharded tensors are left out.
    """
    groups = list(group_small_tensors(tensors))
    suspects = [named for named, is_finite in zip(groups, check_sums_finite(groups)) if not is_finite]
    return [name for named in suspects for name, t in named if not is_all_finite(t)]


def group_small_tensors(tensors: dict[str, Tensor]) -> Iterator[list[tuple[str, Tensor]]]:
    """Yield the floating tensors in groups of (name, tensor).

    A tensor over 16,384 numbers is alone. Smaller ones of one dtype, device and shape are together, up to about a
    million numbers. Sharded tensors are left out.
    """
    groups: dict[object, list[tuple[str, Tensor]]] = defaultdict(list)
    sizes: dict[object, int] = defaultdict(int)
    for name, t in tensors.items():
        if not t.is_floating_point() or (
            type(t) is not Tensor and is_sharded(t)
        ):  # a sharded tensor can only be read by all processes
            continue
        n = t.numel()
        if n > SMALL:
            yield [(name, t)]
            continue
        kind = t.dtype, t.device, t.shape  # tensors of one shape can be stacked
        groups[kind].append((name, t))
        sizes[kind] += n
        if sizes[kind] > TOGETHER:
            yield groups.pop(kind)
            sizes[kind] = 0
    yield from groups.values()


def check_sums_finite(groups: list[list[tuple[str, Tensor]]]) -> list[bool]:
    """Return for each group whether the sum of its numbers is finite; always False for float8.

    A false answer is no proof: the sum may have overflowed. Waits once for each device.
    """
    out = [False] * len(groups)
    places: dict[torch.device, list[int]] = defaultdict(list)
    for i, named in enumerate(groups):
        if named[0][1].dtype not in NARROW:
            places[named[0][1].device].append(i)
    for indices in places.values():  # one wait for each device
        sums_finite = torch.stack([sum_group([t for _, t in groups[i]]).float() for i in indices]).isfinite()
        for i, is_finite in zip(indices, sums_finite.tolist()):
            out[i] = is_finite
    return out


def sum_group(tensors: list[Tensor]) -> Tensor:
    """Return the sum of all numbers of tensors of equal shape."""
    return (tensors[0] if len(tensors) == 1 else torch.stack(tensors)).sum()


def is_file_sum_finite(data: bytes, tensors: dict[str, Tensor]) -> bool:
    """Return True if all tensors of a safetensors file are float32 and the sum of its numbers is finite.

    One pass over the file takes a quarter of the time of one over each tensor. False is no proof of a bad number: the
    sum may have overflowed.
    """
    if {t.dtype for t in tensors.values()} != {torch.float32}:
        return False
    begin = 8 + int.from_bytes(data[:8], "little")
    with np.errstate(all="ignore"):
        return bool(np.isfinite(np.frombuffer(data, "<f4", offset=begin).sum()))


def is_all_finite(t: Tensor) -> bool:
    """Return True if a tensor holds no NaN and no infinite number."""
    return bool((t.float() if t.dtype in NARROW else t).isfinite().all())
