# SPDX-License-Identifier: Apache-2.0
"""When kernels may take short cuts: operations and modules do as written and nothing more; and autograd.Functions whose
backward pass computes in the dtypes that its forward pass left."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, compiler, nn
from torch._C import _are_functorch_transforms_active, _is_any_autocast_enabled, _is_tracing, _len_torch_dispatch_stack
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx
from torch.compiler import is_dynamo_compiling
from torch.nn.modules import module as modules

# ruff: noqa: RUF019 - a membership test takes half of the time of `get`


# hooks on all modules; torch fills and empties these in place
BEFORE, AFTER = modules._global_forward_pre_hooks, modules._global_forward_hooks
BACKWARD_BEFORE, BACKWARD = modules._global_backward_pre_hooks, modules._global_backward_hooks


def eager() -> bool:
    """Return True if operations run as written, and nothing more: no compiler fuses them, no tracer records them, there
    is no functional transform or forward-mode derivative, no hook on all modules. Every layer asks at every call."""
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
    """Return True if an autograd.Function that has a rule for vmap, and compiles, may stand for operations: no tracer
    records them, and nobody wants a forward-mode derivative."""
    return is_dynamo_compiling() or not (_is_tracing() or forward_ad._current_level >= 0)


def once(x: Tensor) -> Tensor:
    """Return x for several uses whose gradients are summed before x gets any: so that the order of a sum with those of
    other modules is the same for an adapter alone and for its rows of a mixed batch."""
    if not (x.requires_grad and torch.is_grad_enabled()) or (not is_dynamo_compiling() and _is_tracing()):
        return x
    return x.view_as(x)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in a dtype: x itself if it has that. To ask takes a tenth of the time of a cast that does nothing."""
    return x if x.dtype == dtype else x.to(dtype)


def functional() -> bool:
    """Return True if a functional transform runs; code within it must not write to tensors."""
    return not is_dynamo_compiling() and _are_functorch_transforms_active()


def watched() -> bool:
    """Return True if a dispatch mode sees operations one by one, and may give them tensors without values."""
    return _len_torch_dispatch_stack() > 0


def has_no_hooks(*modules: nn.Module) -> bool:
    """Return True if calling each module does nothing but its forward, so that code may go past the call. For hooks on
    all modules ask `eager`."""
    for module in modules:
        attributes = module.__dict__  # a lean module may have no dictionaries for hooks
        if (
            ("_forward_hooks" in attributes and attributes["_forward_hooks"])
            or ("_forward_pre_hooks" in attributes and attributes["_forward_pre_hooks"])
            or ("_backward_hooks" in attributes and attributes["_backward_hooks"])
            or ("_backward_pre_hooks" in attributes and attributes["_backward_pre_hooks"])
            or "forward" in attributes
        ):
            return False
    return True


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype of autocast on this device; None if it is off, or the device has none (meta)."""
    if not _is_any_autocast_enabled():
        return None
    kind = device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return None
    return torch.get_autocast_dtype(kind)


class Context(FunctionCtx):
    """What `forward` hands to `backward`: torch's object as type checkers should see it; nobody makes one."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...
    def __getattr__(self, name: str) -> Any: ...  # what `forward` has noted
    def __setattr__(self, name: str, value: object) -> None: ...


class Function(torch.autograd.Function):
    """A Function with one output. Its `backward` does all casts itself; autocast around backward() changes nothing."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        cls.backward = staticmethod(_without_autocast(cls.backward))  # type: ignore[assignment]


def _without_autocast(backward: Callable[[object, Tensor], object]) -> Callable[[Context, Tensor], object]:
    @wraps(backward)
    def run(ctx: Context, g: Tensor) -> object:
        if autocast_dtype(g.device) is None:
            return backward(ctx, g)
        with torch.autocast(g.device.type, enabled=False):
            return backward(ctx, g)

    return run
