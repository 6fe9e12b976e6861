# SPDX-License-Identifier: Apache-2.0
"""When kernels may take short cuts: operations and modules do as written and nothing more.

Also autograd.Functions with backward passes that compute in the dtypes of their forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


# hooks on all modules; torch changes these dicts in place
BEFORE, AFTER = modules._global_forward_pre_hooks, modules._global_forward_hooks
BACKWARD_BEFORE, BACKWARD = modules._global_backward_pre_hooks, modules._global_backward_hooks


def eager() -> bool:
    """Return True if operations run as written, and nothing more.

    False under a compiler, a tracer, a functional transform or a forward-mode derivative, and with a forward or
    backward hook on all modules. Every layer calls this at every call. Dispatch and function modes of torch do not
    count.
    """
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
    """Return True if an autograd.Function that has a rule for vmap, and compiles, may replace operations.

    That is so under torch.compile; elsewhere if no tracer records operations and nobody wants a forward-mode
    derivative.
    """
    return is_dynamo_compiling() or not (_is_tracing() or forward_ad._current_level >= 0)


def once(x: Tensor) -> Tensor:
    """Return a view of x for several uses: autograd sums their gradients before x gets any.

    The order of a sum with gradients of other modules is then the same for an adapter alone and for its rows of a mixed
    batch. Return x itself if it records no gradient, or under a tracer.
    """
    if not (x.requires_grad and torch.is_grad_enabled()) or (not is_dynamo_compiling() and _is_tracing()):
        return x
    return x.view_as(x)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in a dtype: x itself if it has that, which is ten times as fast as a cast that does nothing."""
    return x if x.dtype == dtype else x.to(dtype)


def functional() -> bool:
    """Return True if a functional transform (vmap, grad) runs outside of torch.compile: code in it must not write to
    tensors.
    """
    return not is_dynamo_compiling() and _are_functorch_transforms_active()


def watched() -> bool:
    """Return True if a torch dispatch mode is active: it sees operations one by one, and may give them tensors without
    values.
    """
    return _len_torch_dispatch_stack() > 0


def has_no_hooks(*modules: nn.Module) -> bool:
    """Return True if calling each module does nothing but its class's forward, so that code may call that directly.

    False for a module with a hook (forward, forward pre, backward or backward pre), or with a `forward` set on the
    instance. For hooks on all modules ask `eager`.
    """
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
    """Return the dtype of autocast for the type of a device; None if autocast is off there, or torch has none
    (meta).
    """
    if not _is_any_autocast_enabled():
        return None
    kind = device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return None
    return torch.get_autocast_dtype(kind)


class Context(FunctionCtx):
    """The object that `forward` passes to `backward`: torch's, as type checkers should see it. Nobody makes one."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors for `saved_tensors` of the backward pass. A declaration for type checkers only."""

    def __getattr__(self, name: str) -> Any: ...  # the attributes that `forward` has set
    def __setattr__(self, name: str, value: object) -> None: ...


class Function(torch.autograd.Function):
    """A Function with one output. Its `backward` does all casts itself; autocast around backward() changes nothing.

    Attributes:
        apply_eagerly: `apply` without its checks for functional transforms, for callers that have asked `eager`.
    """

    apply_eagerly: Callable[..., Any]

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Store torch's own `apply` of the subclass as `apply_eagerly`, and replace its `backward` by one that runs
        with autocast off.
        """
        super().__init_subclass__(**kwargs)
        cls.apply_eagerly = super(torch.autograd.Function, cls).apply  # type: ignore[misc]
        cls.backward = staticmethod(_without_autocast(cls.backward))  # type: ignore[assignment]


def _without_autocast(backward: Callable[[object, Tensor], object]) -> Callable[[Context, Tensor], object]:
    """Return a backward function that runs `backward` with autocast off on the device of the gradient."""

    @wraps(backward)
    def run(ctx: Context, g: Tensor) -> object:
        """Return the result of `backward`. Autocast is switched off for it if it is on for the gradient's device."""
        if autocast_dtype(g.device) is None:
            return backward(ctx, g)
        with torch.autocast(g.device.type, enabled=False):
            return backward(ctx, g)

    return run


def differentiate(y: Tensor, inputs: Sequence[Any], need: Sequence[bool], g: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of y, for its gradient g, with regard to the inputs that `need` one; None for the others,
    and for inputs that are None.

    They can be differentiated again.
    """
    wanted = [needs and t is not None for t, needs in zip(inputs, need)]
    values = iter(torch.autograd.grad(y, [t for t, wants in zip(inputs, wanted) if wants], g, create_graph=True))
    return tuple([next(values) if wants else None for wants in wanted])


class VmapFunction(Function):
    """A Function that `vmap` takes: its `forward` gets no context, and `setup_context` saves tensors afterwards."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save all inputs, which are tensors, for the backward pass."""
        ctx.save_for_backward(*inputs)
