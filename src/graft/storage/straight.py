# SPDX-License-Identifier: Apache-2.0
"""Gradients for linear layers that round their inputs, or that have kernels without a backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from graft.core.ops import find_op
from graft.kernels.eager import Context, VmapFunction
from graft.storage.offload import bring_in

MENDED: set[type] = set()
MENDED_FORWARDS: WeakSet[Callable[..., object]] = WeakSet()
OF_KIND: WeakKeyDictionary[type, Any] = WeakKeyDictionary()  # stores, by type of module


def go_straight(
    kind: type[Tensor], linear: object, wanted: Callable[[Tensor], bool], dense: Callable[[Tensor], Tensor]
) -> None:
    """Give linear layers with weights of a tensor class a gradient as if they did not round their inputs.

    The class's `__torch_function__` is replaced, once per class; a second call does nothing. Outputs, modules and files
    stay the same.

    Args:
        linear: torch's function.
        wanted: returns True for a weight if its layer passes no gradient on.
        dense: returns the values (out, in) of a weight.
    """
    if kind in MENDED:
        return
    MENDED.add(kind)
    before = kind.__torch_function__.__func__  # type: ignore[attr-defined]

    def through(
        cls: object, func: object, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        """Run a torch function on the tensor class: as before, but for `linear` under enabled gradients with a wanted
        weight.

        That call returns the same output, and its backward pass multiplies by the dense weight, decoded then. Whether
        the input requires a gradient does not matter. A weight is wanted if it is of the class and `wanted` accepts it.
        """
        kwargs = kwargs or {}
        if func is linear and torch.is_grad_enabled():
            x, weight, bias = linear_arguments(*args, **kwargs)
            if isinstance(weight, kind) and wanted(weight):
                run = lambda x, bias: before(cls, func, types, (x, weight, bias))
                return _Straight.apply(x, bias, lambda: dense(weight), run)
        return before(cls, func, types, args, kwargs)

    kind.__torch_function__ = classmethod(through)  # type: ignore[assignment]


def let_gradients_through(m: nn.Module, store: object) -> None:
    """Give a layer a gradient for its input, and for a bias that trains, where its own forward gives none.

    The forward of the module's class is replaced, once per class; or that of the module alone, if accelerate or
    compressed-tensors has given it one. Classes of torch keep theirs. If the store's `loses_gradient` is true, the
    layer's own backward pass is never used. A layer that cannot be read keeps its own behaviour. `OF_KIND` gets the
    store for the class, unless the module's forward is replaced.
    """
    attributes = m.__dict__
    name = next((name for name in ("_old_forward", "forward") if name in attributes), None)
    if name is not None:
        before = getattr(attributes[name], "__func__", None)
        if before is not None and before not in MENDED_FORWARDS:
            attributes[name] = _through(before, lambda m: store).__get__(m)
        return
    OF_KIND[type(m)] = store
    # a base class may also be one of other stores
    owner: Any = next(c for c in type(m).__mro__ if "forward" in c.__dict__)
    if owner.forward not in MENDED_FORWARDS and not owner.__module__.startswith("torch."):
        owner.forward = _through(owner.forward, lambda m: OF_KIND.get(type(m)))


def _through(before: Callable[..., Tensor], store_of: Callable[[nn.Module], Any]) -> Callable[..., Tensor]:
    """Return a forward that gives the outputs of `before`, with a gradient for the input and for a bias that trains.

    The gradient goes through the dense weight, read in the backward pass. The function is added to `MENDED_FORWARDS`,
    so that it is not wrapped again. It has the name and docstring of `before`.

    store_of: module → its store, or None for a module that keeps `before`.
    """

    @wraps(before)
    def through(m: nn.Module, x: object, *args: object, **kwargs: object) -> Tensor:
        """Return the output of `before`, with gradients through the dense weight where they are needed and can be had.

        `before` alone runs without a store, without grad mode, for an input that is no tensor, and for a weight that
        cannot be read. It also runs if neither the input nor the bias needs a gradient. Its output is kept if it has a
        gradient already or is no tensor, unless the store's `loses_gradient` or a training bias needs a replacement.
        Otherwise the gradient comes from the dense weight, read only in the backward pass.
        """
        store = store_of(m)
        if store is None or not (torch.is_grad_enabled() and isinstance(x, Tensor)):
            return before(m, x, *args, **kwargs)
        bias = getattr(m, "bias", None)
        bias = bias if isinstance(bias, Tensor) and bias.requires_grad else None
        if not x.requires_grad and bias is None:
            return before(m, x, *args, **kwargs)
        run = lambda x, _: before(m, x, *args, **kwargs)
        if not (store.loses_gradient(m) or bias is not None):
            y = before(m, x, *args, **kwargs)
            if not isinstance(y, Tensor) or y.requires_grad:
                return y
            run = lambda *_: y.clone()
        if store.why_unreadable(m) is not None:
            return before(m, x, *args, **kwargs)

        def dense() -> Tensor:
            """Load the layer if it is offloaded, and return its weight in canonical orientation (out, in)."""
            with bring_in(m, None):
                return find_op(m).canon(store.read(m))

        return _Straight.apply(x, bias, dense, run)

    MENDED_FORWARDS.add(through)
    return through


def linear_arguments(input: Tensor, weight: object, bias: Tensor | None = None) -> tuple[Tensor, object, Tensor | None]:
    """Return (input, weight, bias) of a call of torch's linear, however they were passed."""
    return input, weight, bias


class _Straight(VmapFunction):
    """The output of `run`, with the gradient of x Wᵀ + bias.

    `dense` returns the weight W (out, in). It is no input, as functional transforms wrap inputs in tensors of another
    type.
    """

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, dense: Callable[[], Tensor], run: Callable[..., Tensor]) -> Tensor:
        """Return `run(x, bias)`; a copy if it is a view."""
        y = run(x, bias)
        return y.clone() if y._is_view() else y

    @staticmethod
    def setup_context(ctx: Context, inputs: tuple[Tensor, Tensor | None, object, object], output: Tensor) -> None:
        """Keep `dense` and the dtypes of x and bias for the backward pass; no tensor is kept."""
        x, bias, ctx.dense, _ = inputs
        ctx.dtypes = x.dtype, None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Context, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Return the gradients g W for x, and the sum of g over all rows for the bias, each in its dtype; None if not
        needed.

        The weight is read now, and only for the gradient of x.
        """
        dx = db = None
        if ctx.needs_input_grad[0]:
            dx = (g @ ctx.dense().to(g.dtype)).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            db = g.flatten(0, -2).sum(0).to(ctx.dtypes[1])
        return dx, db, None, None
