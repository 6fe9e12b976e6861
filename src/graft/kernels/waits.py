# SPDX-License-Identifier: Apache-2.0
"""Ways not to wait for a device in a step or a forward: numbers of the host, checks of values, copies that are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from weakref import ref

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.utils.weak import WeakTensorKeyDictionary

from graft.kernels.eager import eager, watched

KEPT = 256  # constants


def constant(values: tuple[object, ...], dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """Return numbers as a tensor, which nobody may write to. Copied to the device once, while it is among the `KEPT`
    used last."""
    if device is None or not eager() or watched():  # a compiler cannot trace the last
        return torch.tensor(values, dtype=dtype, device=device)
    return _constant(values, dtype, device)


@lru_cache(maxsize=KEPT)
def _constant(values: tuple[object, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # training may save it for a backward pass
        return torch.tensor(values, dtype=dtype, device=device)


def vector(numbers: Sequence[object], like: Tensor) -> Tensor:
    """Return numbers, or tensors () of one each, as a vector of the dtype of `like`, on its device."""
    if any(isinstance(n, Tensor) for n in numbers):  # scalings that a hot-swap changes
        return torch.stack([torch.as_tensor(n, dtype=like.dtype, device=like.device) for n in numbers])
    return constant(tuple(numbers), like.dtype, like.device)


def differences(ends: Tensor, rows: int) -> list[int]:
    """Return the sizes of groups of rows that end at `ends`; on the meta device, of groups of `rows` that are even.

    Waits for the device: once for all products of one layer, which hand over the same tensor, or once for each in
    inference mode.
    """
    global _read
    if ends.is_meta:
        return [rows // len(ends) + (i < rows % len(ends)) for i in range(len(ends))]
    tensor_ref, version, sizes = _read
    now = None if ends.is_inference() else ends._version  # None: nobody would see that it has changed
    if tensor_ref() is not ends or version != now or now is None:
        sizes = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
        _read = (ref(ends), now, sizes)
    return sizes


_read: tuple[Callable[[], Tensor | None], int | None, list[int]] = (lambda: None, 0, [])


def raise_unless(condition: Tensor, error: Callable[[], Exception], text: str) -> None:
    """Raise the error unless the condition, (), is true. CUDA looks itself, and stops with the text: the host does not
    wait for the values. A compiled graph looks as well, and so stays whole. Other devices have no such check."""
    if condition.is_cuda or is_dynamo_compiling():
        torch._assert_async(condition, text)
    elif not condition:
        raise error()


def move_to_devices(tensors: Sequence[Tensor], devices: Sequence[torch.device]) -> list[Tensor]:
    """Return each tensor on its device, by one copy for all that go to one device with one dtype."""
    out = list(tensors)
    groups: dict[tuple[torch.device, torch.dtype, torch.device], list[int]] = {}
    for i, (t, device) in enumerate(zip(tensors, devices)):
        if t.device != device:
            groups.setdefault((t.device, t.dtype, device), []).append(i)
    for (_, _, device), places in groups.items():
        flat = torch.cat([tensors[i].flatten() for i in places]).to(device)
        for i, part in zip(places, flat.split([tensors[i].numel() for i in places])):
            out[i] = part.view(tensors[i].shape)
    return out


# {tensor: {device: (its version, copy)}}; copies go when the tensor does, and no copy or file of the model holds them
COPIES = WeakTensorKeyDictionary()


def copy_on_device(t: Tensor, device: torch.device) -> Tensor:
    """Return `t` on the device of a layer that is elsewhere: itself, or a copy, which is kept until other values are
    written to `t`.

    No copy of a parameter is kept, and gradients flow to it.
    """
    if t.device == device:
        return t
    if isinstance(t, nn.Parameter) or t.requires_grad or t.is_inference() or not eager() or watched():
        return t.to(device)
    copies: dict[torch.device, tuple[int, Tensor]] = COPIES.setdefault(t, {})
    version, copy = copies.get(device, (-1, t))
    if version != t._version:
        with torch.inference_mode(False):  # or training could not use it
            copy = t.to(device)
        copies[device] = t._version, copy
    return copy
