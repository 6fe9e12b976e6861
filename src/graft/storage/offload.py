# SPDX-License-Identifier: Apache-2.0
"""Weights that accelerate keeps in CPU memory or on disk, and on the meta device between calls of their module."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from graft.core.wrappers import find_offload_hooks, load_offloaded, remove_hook


def device_of(m: nn.Module) -> torch.device | None:
    """Return `execution_device` of the module's first offload hook, as a torch.device; None without a hook or
    a device.
    """
    device = next((h.execution_device for h in find_offload_hooks(m)), None)
    return None if device is None else torch.device(device)


def is_away(m: nn.Module) -> bool:
    """Return True if a parameter or buffer of the module itself is offloaded by accelerate, and on the meta
    device now.
    """
    tensors = (*m._parameters.values(), *m._buffers.values())
    return any(t is not None and t.is_meta for t in tensors) and bool(find_offload_hooks(m))


def computes_on(m: nn.Module, device: torch.device | None) -> torch.device | None:
    """Return the device that a module computes on; None if `device` is None.

    It is accelerate's if `device`, that of its tensors now, is meta and accelerate offloads the module; else `device`.
    """
    return device_of(m) or device if device is not None and device.type == "meta" else device


def is_tied(m: nn.Module, name: str) -> bool:
    """Return True if an offload hook of the module has `name` in its `tied_params_names`: another module shares the
    tensor.
    """
    return any(name in h.tied_params_names for h in find_offload_hooks(m))


def is_hooked(layer: nn.Module) -> bool:
    """Return True if accelerate has hooks (`_hf_hook`) on the base layer or its direct children; without these it has
    none on adapters either.
    """
    base: nn.Module = layer.base_layer
    return any(m is not None and "_hf_hook" in m.__dict__ for m in (base, *base._modules.values()))


@contextmanager
def bring_in(module: nn.Module, written: nn.Module | None) -> Iterator[None]:
    """Load all offloaded tensors below `module` for the block; keep changes to those of `written`.

    Parameters of `written` that this block loads are copied before the block may change them. After a block without an
    error its values are stored on the CPU, in a new `weights_map` of its hook, even if an outer block loaded them. At
    the end each module that this block has loaded is offloaded again, after an error too. With `written=None` no change
    is kept.
    """
    hooked = [(m, hook) for m in module.modules() for hook in find_offload_hooks(m)]
    away = [(m, hook) for m, hook in hooked if is_away(m)]
    for m, hook in away:
        hook.pre_forward(m)
        if m is written:  # p may be accelerate's own copy, or belong to another model
            for p in m._parameters.values():
                if p is not None:
                    p.data = p.data.clone()
    try:
        yield
        for m, hook in hooked:
            if m is written:
                weights = {name: p.detach().to("cpu") for name, p in m._parameters.items() if p is not None}
                hook.weights_map = {**{name: hook.weights_map[name] for name in _buffer_names(m, hook)}, **weights}
    finally:
        for m, hook in away:
            hook.post_forward(m, None)


def write_offloaded(m: nn.Module, name: str, value: Tensor) -> None:
    """Set the stored value of an offloaded tensor: the module has it from the next call on.

    The value is copied to the CPU in the tensor's dtype. The hook gets a new dictionary of stored values.
    """
    tensors: Any = m._parameters if name in m._parameters else m._buffers
    value = value.detach().to("cpu", tensors[name].dtype, copy=True)
    for hook in find_offload_hooks(m):
        names = [*(n for n, p in m._parameters.items() if p is not None), *_buffer_names(m, hook)]
        hook.weights_map = {**{n: hook.weights_map[n] for n in names if n != name}, name: value}


def find_offloaded(root: nn.Module) -> dict[int, tuple[nn.Module, str]]:
    """Return module and name of each offloaded parameter or buffer below `root`, by the id of its placeholder on the
    meta device.

    Only modules with an offload hook count; tensors that are loaded now are left out.
    """
    by_module = ((m, (*m._parameters.items(), *m._buffers.items())) for m in root.modules() if find_offload_hooks(m))
    return {id(t): (m, name) for m, tensors in by_module for name, t in tensors if t is not None and t.is_meta}


def _buffer_names(m: nn.Module, hook: Any) -> list[str]:
    """Return the names of the module's persistent buffers if the hook offloads buffers; else an empty list."""
    return [n for n in m._buffers if hook.offload_buffers and n not in m._non_persistent_buffers_set]


def copy_into_memory(module: nn.Module, copies: dict[int, object] | None = None) -> nn.Module:
    """Return a deep copy of a module with all tensors in memory, without accelerate's offloading hooks.

    If nothing in it is offloaded, other hooks of accelerate are kept and shared with the original. Otherwise the copy
    has no hooks at all, and loads the stored values. The original does not change.

    copies: replacements for copies, by the id of the original; it is not changed.
    """
    old = list(module.modules())
    if not any(map(find_offload_hooks, old)):
        same = {id(hook): hook for m in old if (hook := m.__dict__.get("_hf_hook")) is not None}
        return copy.deepcopy(module, {**(copies or {}), **same})
    clone = copy.deepcopy(module, {**(copies or {}), **{id(m.__dict__.get("_hf_hook")): None for m in old}})
    for source, m in zip(old, without_hooks(clone).modules()):
        if is_away(source):
            load_offloaded(m, source)
    return clone


def without_hooks(module: nn.Module) -> nn.Module:
    """Remove accelerate's hooks from a module and its children, in place, without moving tensors; return the module."""
    for m in module.modules():
        remove_hook(m)
    return module
