# SPDX-License-Identifier: Apache-2.0
"""Whether operations and modules do what is written and nothing more, so that short cuts past them are allowed."""

# ruff: noqa: RUF019 - a membership test takes half of the time of `get`

from __future__ import annotations

import torch
from torch import compiler, nn
from torch._C import _are_functorch_transforms_active, _is_any_autocast_enabled, _is_tracing, _len_torch_dispatch_stack
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.nn.modules import module as modules

# on all modules; filled and emptied in place
BEFORE, AFTER = modules._global_forward_pre_hooks, modules._global_forward_hooks
BACKWARD_BEFORE, BACKWARD = modules._global_backward_pre_hooks, modules._global_backward_hooks


def eager() -> bool:
    """Whether operations run as they are written, and nothing more: no compiler to fuse them or tracer to record them,
    no functional transform or forward-mode derivative, no hook on all modules. Every layer asks at every call."""
    return not (
        is_dynamo_compiling()
        or compiler._is_compiling_flag
        or _are_functorch_transforms_active()
        or _is_tracing()
        or forward_ad._current_level >= 0
        or BEFORE
        or AFTER
        or BACKWARD
        or BACKWARD_BEFORE
    )


def only_backward() -> bool:
    """Whether an autograd.Function may stand for operations that has a rule for vmap and can be compiled: no tracer
    records them, no forward-mode derivative is wanted."""
    return is_dynamo_compiling() or not (_is_tracing() or forward_ad._current_level >= 0)


def functional() -> bool:
    """Whether a functional transform runs, within which nothing may be written."""
    return not is_dynamo_compiling() and _are_functorch_transforms_active()


def watched() -> bool:
    """Whether a dispatch mode sees operations one by one, and may give them tensors without values."""
    return _len_torch_dispatch_stack() > 0


def has_no_hooks(module: nn.Module) -> bool:
    """Whether calling a module does nothing but its forward, so that it need not be called. Whether there are hooks on
    all modules, `eager` tells."""
    held = module.__dict__  # a lean module may have no dictionaries for hooks
    return not (
        ("_forward_hooks" in held and held["_forward_hooks"])
        or ("_forward_pre_hooks" in held and held["_forward_pre_hooks"])
        or ("_backward_hooks" in held and held["_backward_hooks"])
        or ("_backward_pre_hooks" in held and held["_backward_pre_hooks"])
        or "forward" in held
    )


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes in on this device; None if it is off, or unknown there (meta)."""
    if not _is_any_autocast_enabled():
        return None
    kind = device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return None
    return torch.get_autocast_dtype(kind)
