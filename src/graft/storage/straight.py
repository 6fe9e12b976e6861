# SPDX-License-Identifier: Apache-2.0
"""Gradients for tensors whose linear layers round their inputs and pass no gradient on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graft.kernels.function import Function

MENDED: set[type] = set()


def go_straight(kind: type[Tensor], linear: Any, wanted: Callable[[Any], bool], dense: Callable[[Any], Tensor]) -> None:
    """Let gradients through linear layers whose weight is of a tensor class, as if they did not round.

    The class itself changes, once: modules and what is saved of them stay as they are. Values stay the same.

    Args:
        linear: torch's function.
        wanted: says of a weight whether its layer passes no gradient on.
        dense: returns its values (out, in).
    """
    if kind in MENDED:
        return
    MENDED.add(kind)
    before = kind.__torch_function__.__func__  # type: ignore[attr-defined]

    def through(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is linear and torch.is_grad_enabled():
            x, weight, bias = given(*args, **kwargs)
            if isinstance(weight, kind) and wanted(weight):
                run = lambda *args: before(cls, func, types, args)
                return _Straight.apply(x, bias, weight, dense, run)
        return before(cls, func, types, args, kwargs)

    kind.__torch_function__ = classmethod(through)  # type: ignore[assignment]


def given(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    return input, weight, bias


class _Straight(Function):
    @staticmethod
    def forward(x, bias, weight, dense, run):
        y = run(x, weight, bias)
        return y.clone() if y._is_view() else y

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, bias, ctx.weight, ctx.dense, _ = inputs
        ctx.dtypes = x.dtype, None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx, g):
        dx = db = None
        if ctx.needs_input_grad[0]:
            dx = (g @ ctx.dense(ctx.weight).to(g.dtype)).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            db = g.flatten(0, -2).sum(0).to(ctx.dtypes[1])
        return dx, db, None, None, None
