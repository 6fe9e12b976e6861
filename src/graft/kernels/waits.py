# SPDX-License-Identifier: Apache-2.0
"""Ways to avoid waiting for a device in a step or a forward: constants, checks of values, and cached copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from weakref import ref

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.utils.weak import WeakTensorKeyDictionary

from graft.kernels.eager import eager, watched

KEPT = 256  # number of cached constants


def constant(values: tuple[object, ...], dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """Return numbers as a tensor on a device, which nobody may write to.

    The `KEPT` constants used last are cached, so that each is copied to the device once. Under compilers, transforms
    and dispatch modes, and with `device` None (torch's default device), the tensor is new.
    """
    if device is None or not eager() or watched():  # a compiler cannot trace the last
        return torch.tensor(values, dtype=dtype, device=device)
    return _constant(values, dtype, device)


@lru_cache(maxsize=KEPT)
def _constant(values: tuple[object, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers as a tensor, and cache it by the arguments.

    It is no tensor of inference mode, as training may save it.
    """
    with torch.inference_mode(False):  # a backward pass may need it later
        return torch.tensor(values, dtype=dtype, device=device)


def vector(numbers: Sequence[object], like: Tensor) -> Tensor:
    """Return numbers, or tensors () of one number each, as a vector with the dtype and device of `like`.

    With a tensor among them it is a new stack, through which gradients flow. Without, it is a cached constant: nobody
    may write to it.
    """
    if any(isinstance(n, Tensor) for n in numbers):  # scalings that a hot-swap changes
        return torch.stack([torch.as_tensor(n, dtype=like.dtype, device=like.device) for n in numbers])
    return constant(tuple(numbers), like.dtype, like.device)


def differences(ends: Tensor, rows: int) -> list[int]:
    """Return the sizes of groups of rows that end at `ends`; on the meta device, sizes of `rows` rows as even as
    possible.

    Waits for the device. The sizes of the last tensor are cached while its version stays: several products of one layer
    pass the same `ends` and wait once. Tensors of inference mode are read anew each time.
    """
    global _read
    if ends.is_meta:
        return [rows // len(ends) + (i < rows % len(ends)) for i in range(len(ends))]
    tensor_ref, version, sizes = _read
    now = None if ends.is_inference() else ends._version  # None: torch does not count its changes
    if tensor_ref() is not ends or version != now or now is None:
        sizes = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
        _read = (ref(ends), now, sizes)
    return sizes


_read: tuple[Callable[[], Tensor | None], int | None, list[int]] = (lambda: None, 0, [])


def raise_unless(condition: Tensor, error: Callable[[], Exception], text: str) -> None:
    """Raise error() unless the condition, a tensor (), is true.

    On CUDA and under torch.compile the device checks it, and stops with `text`: the host does not wait, `error` is not
    called, and a compiled graph stays whole.
    """
    if condition.is_cuda or is_dynamo_compiling():
        torch._assert_async(condition, text)
    elif not condition:
        raise error()


# {tensor: {device: (its version, copy)}}; copies are freed with the tensor, and no copy or file of the model has them
COPIES = WeakTensorKeyDictionary()


def copy_on_device(t: Tensor, device: torch.device) -> Tensor:
    """Return `t` on a device: `t` itself if it is there, else a copy, which is cached until `t` is written to or freed.

    Parameters, tensors that need a gradient, and tensors of inference mode are copied at each call; gradients flow
    through. So are all tensors under compilers, transforms and dispatch modes.
    """
    if t.device == device:
        return t
    if isinstance(t, nn.Parameter) or t.requires_grad or t.is_inference() or not eager() or watched():
        return t.to(device)
    copies: dict[torch.device, tuple[int, Tensor]] = COPIES.setdefault(t, {})
    version, copy = copies.get(device, (-1, t))
    if version != t._version:
        with torch.inference_mode(False):  # training cannot use a tensor of inference mode
            copy = t.to(device)
        copies[device] = t._version, copy
    return copy
