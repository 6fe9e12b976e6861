# SPDX-License-Identifier: Apache-2.0
"""The choice of a kernel for an effect. Kernels take plain tensors; a layer calls modules with hooks one by one.

The layer checks first (`may_fuse`) that a kernel may overwrite its output, and use its weight without calling it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from graft.core.effect import Compact, Factors, Product, Unformed
from graft.core.lean import Linear, share_dropped
from graft.core.protocols import Layer
from graft.kernels import decomposed, one_product
from graft.kernels.eager import has_no_hooks, once
from graft.kernels.low_rank import (
    FUSED_FROM,
    add_low_rank,
    add_product,
    add_scaled,
    autocast,
    dropout,
    linear_with,
    low_rank_linear,
    one_product_pays,
    worth_it,
)
from graft.kernels.segments import Segment

LINEARS = frozenset({Linear, nn.Linear})
PLAIN = frozenset({Tensor, nn.Parameter})  # no subclasses, such as shards


def plain(f: Factors) -> tuple[Tensor, Tensor, float] | None:
    """Return A, B and the share that dropout takes out, if the factors compute no more than W x + s · B A dropout(x),
    vectors aside, on a linear layer. None if the layer has to call modules."""
    A, B = tensor_of(f.A), tensor_of(f.B)
    if A is None or B is None:
        return None
    p = 0.0 if f.dropout is None else share_dropped(f.dropout)
    return None if p is None else (A, B, p)


def tensor_of(factor: Any) -> Tensor | None:
    """Return the matrix of a factor; None if to call it is more than a product with that."""
    kind = type(factor)
    if kind in LINEARS:
        if factor._parameters["bias"] is not None or not has_no_hooks(factor):
            return None
        factor = weight_of(factor)
    elif kind is Compact:
        if not has_no_hooks(factor.module):
            return None
        factor = factor.weight
    return factor if type(factor) in PLAIN else None


def weight_of(linear: nn.Module) -> Tensor:
    """Return the weight of a linear layer. Only a parametrization needs the attribute, which is slower."""
    parameter = linear._parameters.get("weight")
    weight: Tensor = linear.weight if parameter is None else parameter
    return weight


def is_fixed(A: Tensor, B: Tensor) -> bool:
    """Return True if only the vectors between and around the factors train."""
    return not (A.requires_grad or B.requires_grad)


def scale_of(f: Factors) -> Any:
    return 1.0 if f.scale is None else f.scale


def scaled(A: Tensor, B: Tensor, f: Factors) -> tuple[Tensor, Tensor]:
    """Return the factors with the vectors in them."""
    A = A if f.inner is None else f.inner[:, None] * A
    return A, B if f.outer is None else f.outer[:, None] * B


def joined(layer: Layer, f: Factors, x: Tensor) -> Tensor | None:
    """Return the layer's output with these factors, both from one kernel; None if there is no such kernel."""
    found = plain(f)
    if found is None:
        x = once(x)
        return called(f, x, partial(layer.base_layer, x))
    A, B, p = found
    base, op = layer.base_layer, layer.op
    if f.gain is not None:
        if not worth_it(x):
            return None
        A, B = scaled(A, B, f)
        W, b = layer.weight_now, base.bias
        return decomposed.dora_linear(base, op.input_gradient, x, W, b, A, B, f.gain, scale_of(f), p)
    if f.inner is not None or f.outer is not None:
        if f.inner is not None and f.outer is not None and is_fixed(A, B):
            return _around_fixed(layer, A, B, f, x, p)
        A, B = scaled(A, B, f)
    if not torch.is_grad_enabled():
        return add_low_rank(base(x), x, A, B, scale_of(f), p)
    if B.requires_grad and not A.requires_grad:
        x = once(x)
        return _with_fixed_down(A, B, f, x, base(x), p)
    W, scale = layer.weight_now, scale_of(f)
    if p == 0 and worth_it(x) and one_product_beats(W, x, x.numel() // x.shape[-1], A, B):
        delta = one_product.Factored(A, B, scale)
        return one_product.linear_with(W, base.bias, x, delta, partial(op.call, base), op.input_gradient)
    return low_rank_linear(base, op.input_gradient, W, x, A, B, scale, p)


def one_product_beats(W: Tensor, x: Tensor, rows: int, A: Tensor, B: Tensor) -> bool:
    """Return True if `rows` rows like those of x cost less by W + s · B A than by factors."""
    if not W.dtype == x.dtype == A.dtype:
        return False
    return one_product.low_rank_pays(rows, len(W), W.shape[1], len(A), A.requires_grad, B.requires_grad)


def segment(W: Tensor, f: Factors, x: Tensor, rows: int) -> Segment | None:
    """Return what these factors add to `rows` rows like those of x, without a seed, if `joined` would run
    `low_rank_linear` for these rows alone, with gradients. Then other adapters' rows can share the call of the base."""
    if f.gain is not None or f.inner is not None or f.outer is not None:
        return None
    found = plain(f)
    if found is None or (found[1].requires_grad and not found[0].requires_grad):
        return None
    A, B, p = found
    scale, few = scale_of(f), rows < FUSED_FROM
    if isinstance(scale, Tensor) or (few and (p or not x.dtype == W.dtype == A.dtype == B.dtype)):
        return None
    if not few and p == 0 and one_product_beats(W, x, rows, A, B):
        return None
    return Segment(rows, A, B, scale, p)


def is_still(f: Factors, was: Factors, segment: Segment) -> bool:
    """Return True if factors are what they were when a segment was made of them, from which nothing is dropped."""
    if f.A is not was.A or f.B is not was.B or f.scale != was.scale or f.dropout is not was.dropout:
        return False
    if f.dropout is not None and share_dropped(f.dropout) != 0:
        return False
    return tensor_of(f.A) is segment.A and tensor_of(f.B) is segment.B


def added(f: Factors, x: Tensor, y: Tensor) -> Tensor | None:
    """Add the factors' part to y, in its memory, and return y; None if no kernel does that."""
    found = plain(f)
    if found is None:
        return called(f, x, lambda: y)
    A, B, p = found
    if f.inner is not None or f.outer is not None:
        if f.inner is not None and f.outer is not None and is_fixed(A, B):
            return _add_around_fixed(A, B, f, x, y, p)
        A, B = scaled(A, B, f)
    if torch.is_grad_enabled() and B.requires_grad and not A.requires_grad:
        return _with_fixed_down(A, B, f, x, y, p)
    return add_low_rank(y, x, A, B, scale_of(f), p)


def _with_fixed_down(A: Tensor, B: Tensor, f: Factors, x: Tensor, y: Tensor, p: float) -> Tensor:
    """Add to y the part of factors of which A gets no gradient, so that the backward pass needs no x."""
    (A,) = autocast(x, A)
    x = x.to(A.dtype)
    return add_product(y, (dropout(x, p) if p else x) @ A.T, B, scale_of(f))


def called(f: Factors, x: Tensor, base: Callable[[], Tensor]) -> Tensor | None:
    """Return the output with an A that is a `Product`, which this calls; else None. base: gives what to add to."""
    if type(f.A) is not Product or f.gain is not None:
        return None
    B, p = tensor_of(f.B), 0.0 if f.dropout is None else share_dropped(f.dropout)
    if B is None or p is None:
        return None
    h = f.A(dropout(x, p) if p else x)
    h = h if f.inner is None else h * f.inner
    return add_product(base(), h, B if f.outer is None else f.outer[:, None] * B, scale_of(f))


def _around_fixed(layer: Layer, A: Tensor, B: Tensor, f: Factors, x: Tensor, p: float) -> Tensor:
    base, op, W = layer.base_layer, layer.op, layer.weight_now
    if (
        p == 0
        and worth_it(x)
        and W.dtype == x.dtype == A.dtype  # a sum would round ΔW to the dtype of W
        and one_product_pays(x.numel() // x.shape[-1], *W.shape)
    ):
        d, b = f.inner, _outer(f)
        return linear_with(W, base.bias, x, A, B, d, b, partial(op.call, base), op.input_gradient)  # type: ignore[arg-type]
    x = once(x)
    return _add_around_fixed(A, B, f, x, base(x), p)


def _add_around_fixed(A: Tensor, B: Tensor, f: Factors, x: Tensor, y: Tensor, p: float) -> Tensor:
    A, B, d, b = autocast(x, A, B, f.inner, _outer(f))  # type: ignore[arg-type]
    x = x.to(A.dtype)
    return add_scaled(y, (dropout(x, p) if p else x) @ A.T, B, d, b)


def _outer(f: Factors) -> Tensor:
    return f.outer if f.scale is None else f.outer * f.scale  # type: ignore[return-value,operator]


def updated(
    layer: Layer, delta: Tensor | Unformed | None, bias: Tensor | None, x: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """Return x (W + ΔW)ᵀ + b by one product; None where two are cheaper, or the sum would round ΔW."""
    W, base, op = layer.weight_now, layer.base_layer, layer.op
    if W.dtype != x.dtype or not worth_it(x):
        return None
    b = base.bias
    if bias is not None:
        b = bias if b is None else b + bias
    if delta is None:
        return op.call(base, x, W, b) if W.dtype == dtype else None
    call, back = partial(op.call, base), op.input_gradient
    if not isinstance(delta, Tensor):
        return delta.linear_with(W, b, x, call, back)
    return one_product.linear_with(W, b, x, one_product.Dense(delta), call, back) if W.dtype == dtype else None
