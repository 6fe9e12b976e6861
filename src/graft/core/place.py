# SPDX-License-Identifier: Apache-2.0
"""Device and dtype of an adapter's tensors: those of the base weight, then float32 where training needs it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graft.core.containers import AnyDict, BufferDict

_FLOAT8 = tuple(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
    if hasattr(torch, name)
)
UPCAST = (torch.float16, torch.bfloat16, *_FLOAT8)  # adapters in these train in float32 unless the user says otherwise


def moved(t: Tensor, device: torch.device | None, dtype: torch.dtype | None, upcast: bool) -> Tensor:
    """Return `t` on `device`; floats rounded to `dtype`, as PEFT rounds them, and then widened if `upcast`."""
    if t.is_floating_point() or t.is_complex():
        if t.is_floating_point() and dtype is not None:
            t = t.to(dtype)
        if upcast and t.dtype in UPCAST:
            t = t.to(torch.float32)
    return t if device is None or t.device == device or t.is_meta else t.to(device)


def place_module(m: nn.Module, device: torch.device | None, dtype: torch.dtype | None, upcast: bool) -> None:
    for module in m.modules():
        for name, p in module._parameters.items():
            if p is not None:
                place_parameter(module, name, p, device, dtype, upcast)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = moved(b, device, dtype, False)


class Exact(nn.Module):
    """A module whose buffers move with the base weight and keep their dtype."""


def place_tensor(
    owner: nn.Module, name: str, device: torch.device | None, dtype: torch.dtype | None, upcast: bool
) -> None:
    """Move and cast a parameter or buffer of a module."""
    p = owner._parameters.get(name)
    if p is not None:
        place_parameter(owner, name, p, device, dtype, upcast)
    elif isinstance(owner, Exact):
        owner._buffers[name] = moved(owner._buffers[name], device, None, False)  # type: ignore[arg-type]
    else:
        upcast = upcast and isinstance(owner, (BufferDict, AnyDict))  # as in PEFT: not those of an adapter's modules
        owner._buffers[name] = moved(owner._buffers[name], device, dtype, upcast)  # type: ignore[arg-type]


def place_parameter(
    owner: nn.Module, name: str, p: nn.Parameter, device: torch.device | None, dtype: torch.dtype | None, upcast: bool
) -> None:
    if p.dtype == dtype and (p.device == device or device is None) and not (upcast and dtype in UPCAST):
        return
    before = p.data
    data = moved(before, device, dtype, upcast)
    if data is not before:
        owner._parameters[name] = nn.Parameter(data, requires_grad=p.requires_grad)


def place(container: Any, adapter: str, device: torch.device | None, dtype: torch.dtype | None, upcast: bool) -> None:
    """Move and cast the tensors of `adapter` in `container`. Integer tensors keep their dtype."""
    if isinstance(container, nn.ModuleDict):
        place_module(container[adapter], device, dtype, upcast)
    elif isinstance(container, nn.ParameterDict):
        place_parameter(container, adapter, container[adapter], device, dtype, upcast)
    elif isinstance(container, BufferDict):
        container._buffers[adapter] = moved(container[adapter], device, dtype, upcast)
