# SPDX-License-Identifier: Apache-2.0
"""Inputs of modules that accelerate dispatches: its hooks move them to where a module computes, and its adapters are
there, too."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

HOOK = "_hf_hook"  # accelerate's mark on a module


def brought_in(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any, Callable[[Any], Any] | None]:
    """Return the arguments of a call on the device to which the module's hook would move them, and the function for the
    output that moves it to where the hook would; None if it stays."""
    hook = module.__dict__[HOOK]
    for h in getattr(hook, "hooks", (hook,)):
        if hasattr(h, "io_same_device") and h.execution_device is not None:
            device = torch.device(h.execution_device)
            came = first_device((args, kwargs)) if h.io_same_device else None
            skipped = (h.skip_keys,) if isinstance(h.skip_keys, str) else h.skip_keys or ()
            back = None if came is None or came == device else partial(sent, device=came)
            return sent(args, device), sent(kwargs, device, skipped), back
    return args, kwargs, None


def sent(value: Any, device: torch.device, skipped: Collection[str] = ()) -> Any:
    """Return a value with all tensors in it on `device`, but for those below the keys `skipped`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)([sent(v, device, skipped) for v in value])
    if type(value) is dict:
        return {k: v if k in skipped else sent(v, device, skipped) for k, v in value.items()}
    return value


def first_device(value: Any) -> torch.device | None:
    """Return the device of the first tensor in a value."""
    if isinstance(value, Tensor):
        return value.device
    inside = value.values() if type(value) is dict else value if type(value) in (tuple, list) else ()
    return next((d for v in inside if (d := first_device(v)) is not None), None)
