# SPDX-License-Identifier: Apache-2.0
"""A weight that accelerate keeps on the CPU or on disk, and brings to its device for each call of the module.

Between calls the module holds a meta tensor. What adapters need of the weight itself is read from where accelerate has
it; a new value (merged, or put back) stays in the CPU's memory from then on, and files are left as they are.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from graft.storage.dense import Dense


def offloading_hook(m: nn.Module) -> Any:
    """The hook that brings the module's weights, if there is one."""
    hook = m.__dict__.get("_hf_hook")
    if hook is None:
        return None
    return next((h for h in getattr(hook, "hooks", (hook,)) if getattr(h, "offload", False)), None)


class Offloaded(Dense):
    name = "offloaded"
    live = False

    def read(self, m: nn.Module, name: str = "weight") -> Tensor:
        hook = offloading_hook(m)
        p = getattr(m, name)
        return p if hook is None or not p.is_meta else hook.weights_map[name].to(hook.execution_device)

    def write(self, m: nn.Module, name: str, W: Tensor, shared: bool = False) -> nn.Module | None:
        held = offloading_hook(m).weights_map
        if hasattr(held, "prefix"):  # a part of the whole model's map
            held, name = held.dataset, f"{held.prefix}{name}"
        values = getattr(held, "state_dict", held)  # comes before the files of a map that has such
        values[name] = W.detach().to("cpu").contiguous()
        return None

    def snapshot(self, m: nn.Module, name: str = "weight", shared: bool = False) -> Tensor:
        return offloading_hook(m).weights_map[name].clone()  # type: ignore[no-any-return]

    def restore(self, m: nn.Module, name: str, state: Tensor) -> None:
        self.write(m, name, state)

    def where(self, m: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        hook = offloading_hook(m)
        device, dtype = super().where(m)
        return (device if hook is None else torch.device(hook.execution_device)), dtype


def standalone(module: nn.Module) -> nn.Module:
    """A copy with its weights in place, which accelerate brings nothing to."""
    old = list(module.modules())
    if not any(offloading_hook(m) for m in old):
        return copy.deepcopy(module)
    made = copy.deepcopy(module, {id(m.__dict__.get("_hf_hook")): None for m in old})
    for source, m in zip(old, made.modules()):
        hook = offloading_hook(source)
        for name in ("_hf_hook", "_old_forward", "forward"):
            m.__dict__.pop(name, None)
        for held in (m._parameters, m._buffers):
            for name, t in held.items():
                if hook is not None and t is not None and t.is_meta:
                    value = hook.weights_map[name].to(hook.execution_device, copy=True)
                    held[name] = nn.Parameter(value, t.requires_grad) if held is m._parameters else value  # type: ignore[assignment]
    return made
