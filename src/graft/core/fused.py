# SPDX-License-Identifier: Apache-2.0
"""The choice of a kernel for low-rank factors or for a ΔW.

Kernels take plain tensors; modules with hooks are called instead.

The layer checks first that a kernel may use its weight without calling the layer, and may overwrite its output.

An update may give its ΔW in a form that is not computed yet, such as a product of Hadamard factors. That form adds
itself to W, and gives the gradients of its parts (`kernels/one_product.py`). Factors that a module holds in short form
(blocks of BD-LoRA, groups of QA-LoRA) are passed to kernels as the whole matrix, while hooks see the module.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from graft.core.effect import Compact, Factors, Product, Unformed
from graft.core.lean import Linear, find_dropout_rate
from graft.core.method import Layer, Method
from graft.kernels import decomposed, one_product
from graft.kernels.eager import autocast_dtype, cast, has_no_hooks, once
from graft.kernels.low_rank import (
    FUSED_FROM,
    add_low_rank,
    add_product,
    add_scaled,
    autocast,
    dropout,
    few_rows_linear,
    linear_with,
    low_rank_linear,
    one_product_pays,
    worth_it,
)
from graft.kernels.segments import Segment

LINEARS = frozenset({Linear, nn.Linear})
PLAIN = frozenset({Tensor, nn.Parameter})  # without subclasses, such as shards


def plain_factors(f: Factors) -> tuple[Tensor, Tensor, Any, float] | None:
    """Return (A, B, scale, dropout share) if the factors compute no more than W x + s · B A dropout(x), apart from
    their vectors and gain.

    Scale None becomes 1.0, and the share is 0.0 without dropout. Returns None if A or B has no plain matrix
    (`factor_tensors`), or the dropout module does more than drop a share of the inputs: then the layer has to call
    modules.
    """
    A, B = factor_tensors(f.A, f.B)
    if A is None or B is None:
        return None
    p = 0.0 if f.dropout is None else find_dropout_rate(f.dropout)
    return None if p is None else (A, B, 1.0 if f.scale is None else f.scale, p)


def factor_tensors(*factors: Any) -> list[Tensor | None]:
    """Return the matrix of each factor, a plain tensor itself; None for a factor if its call may do more than multiply
    by that matrix.

    None is returned for a linear layer with a bias or hooks, for a `Compact` with hooks on its module, and for any
    other callable. It is returned, too, for subclasses of Tensor, such as shards.
    """
    tensors: list[Tensor | None] = []
    for factor in factors:
        kind = type(factor)
        if kind in LINEARS:
            if factor._parameters["bias"] is not None or not has_no_hooks(factor):
                factor = None
            else:  # reading the attribute is slower: only for a weight that is no parameter now
                W = factor._parameters.get("weight")
                factor = factor.weight if W is None else W
        elif kind is Compact:
            factor = factor.weight if has_no_hooks(factor.module) else None
        tensors.append(factor if type(factor) in PLAIN else None)
    return tensors


def absorb_vectors(A: Tensor, B: Tensor, f: Factors) -> tuple[Tensor, Tensor]:
    """Return A with `inner` multiplied into its rows, and B with `outer` multiplied into its rows; unchanged without
    these vectors.
    """
    A = A if f.inner is None else f.inner[:, None] * A
    return A, B if f.outer is None else f.outer[:, None] * B


def run_with_factors(layer: Layer, f: Factors, x: Tensor) -> Tensor | None:
    """Return the layer's output with these factors, computed by kernels; None if no kernel fits, without calling the
    base.

    With gradients and at least `FUSED_FROM` (64) rows, one kernel computes base and update together, if that pays. With
    gradients and fewer rows `_run_few_rows` is tried. Else the base layer is called, and a kernel adds the update in
    its output's memory. A gain needs the first way. Factors that are not plain matrices need an A that is a `Product`.
    """
    joint = torch.is_grad_enabled() and x.numel() >= FUSED_FROM * x.shape[-1]  # for fewer rows two kernels cost less
    if f.gain is not None and not joint:
        return None
    base: Any = layer._modules["base_layer"]
    parts = plain_factors(f)
    if joint and parts is not None and (y := _run_joint(layer, f, x, *parts)) is not None:
        return y
    if not joint and parts is not None and (y := _run_few_rows(base, f, x, *parts)) is not None:
        return y
    x = once(x)
    if parts is None or f.gain is not None:
        return run_product_factor(f, x, partial(base, x))
    return _add_parts(f, base(x), x, *parts)


def _run_few_rows(base: Any, f: Factors, x: Tensor, A: Tensor, B: Tensor, scale: Any, p: float) -> Tensor | None:
    """Return the output of an `nn.Linear` for few rows, with gradients, from one kernel.

    Returns None for a module of another class, without gradients, under autocast, for a W that is no plain tensor, and
    if x, W, A and B differ in dtype. Also with dropout, with `inner` or `outer` vectors, for a frozen A or a scale that
    is a tensor.
    """
    if p or not (type(base) in LINEARS and torch.is_grad_enabled() and A.requires_grad) or f.inner is not None:
        return None
    W, dtype = base._parameters.get("weight"), x.dtype
    if type(W) not in PLAIN or not (W.dtype == dtype == A.dtype == B.dtype):
        return None
    if f.outer is not None or isinstance(scale, Tensor) or autocast_dtype(x.device) is not None:
        return None
    return few_rows_linear(x, W, base._parameters["bias"], A, B, scale)


def _run_joint(layer: Layer, f: Factors, x: Tensor, A: Tensor, B: Tensor, scale: Any, p: float) -> Tensor | None:
    """Return the layer's output for many rows, with gradients, from one kernel; None if two kernels cost less.

    The first case counts. "Plain" means no dropout, no autocast, and one dtype for W, x and A.

    - Only the vectors train, without gain: a product with W + ΔW if all is plain and that pays, else None.
    - A gain: DoRA's kernel, but None under autocast.
    - B trains and A does not: None.
    - Plain and enough rows: a product with W + s · B A.
    - Otherwise: the low-rank kernel.

    The vectors are multiplied into A and B after the first case.
    """
    W, op, rows = layer.weight_now, layer.op, x.numel() // x.shape[-1]
    base: Any = layer.base_layer
    call, back, casts = partial(op.call, base), op.input_gradient, autocast_dtype(x.device) is not None
    same = p == 0 and not casts and W.dtype == x.dtype == A.dtype  # otherwise the sum would round ΔW to the dtype of W
    if f.gain is None and _only_vectors_train(f, A, B):
        if not (same and one_product_pays(rows, *W.shape)):
            return None
        return linear_with(W, base.bias, x, A, B, f.inner, _outer_times_scale(f), call, back)  # type: ignore[arg-type]
    A, B = absorb_vectors(A, B, f)
    if f.gain is not None:
        return None if casts else decomposed.dora_linear(base, back, x, W, base.bias, A, B, f.gain, scale, p)
    if B.requires_grad and not A.requires_grad:
        return None
    if same and one_product_beats(W, rows, A, B):
        return one_product.linear_with(W, base.bias, x, one_product.Factored(A, B, scale), call, back)
    return low_rank_linear(base, back, W, x, A, B, scale, p)


def one_product_beats(W: Tensor, rows: int, A: Tensor, B: Tensor) -> bool:
    """Return True if a product of `rows` rows with W + s · B A costs less than products with W, A and B, by
    `low_rank_pays`.
    """
    return one_product.low_rank_pays(rows, len(W), W.shape[1], len(A), A.requires_grad, B.requires_grad)


def make_segment(W: Tensor, f: Factors, x: Tensor, rows: int) -> Segment | None:
    """Return a `Segment`: the addition of these factors to `rows` rows of x, with a seed still missing.

    Rows of several adapters can then share one call of the base layer.

    Returns None if `run_with_factors` would not run `low_rank_linear` for these rows alone, with gradients: the factors
    have a gain or vectors, are not plain, have a tensor as scale, or train B alone. Below FUSED_FROM (64) rows, it
    returns None with dropout or unless x, W, A and B have one dtype. From 64 rows on, it returns None if the product
    with W + s · B A costs less. That holds only without dropout and with one dtype of x, W and A.
    """
    if f.gain is not None or f.inner is not None or f.outer is not None:
        return None
    parts = plain_factors(f)
    if parts is None or isinstance(parts[2], Tensor) or (parts[1].requires_grad and not parts[0].requires_grad):
        return None
    A, B, scale, p = parts
    same = p == 0 and x.dtype == W.dtype == A.dtype
    if not (same and A.dtype == B.dtype) if rows < FUSED_FROM else same and one_product_beats(W, rows, A, B):
        return None
    return Segment(rows, A, B, scale, p)


def is_unchanged(f: Factors, was: Factors, segment: Segment) -> bool:
    """Return True if factors have the same A, B, scale and dropout objects as when `segment` was made of them, the same
    matrices, and drop nothing now. Scales are compared by value. Factors that are no longer plain matrices give False.
    """
    if f.A is not was.A or f.B is not was.B or f.scale != was.scale or f.dropout is not was.dropout:
        return False
    parts = plain_factors(f)
    return parts is not None and parts[0] is segment.A and parts[1] is segment.B and parts[3] == 0


def add_factors(f: Factors, x: Tensor, y: Tensor) -> Tensor | None:
    """Add the update by the factors to y, in its memory, and return y.

    Returns None, with y unchanged, if no kernel can.
    """
    parts = plain_factors(f)
    return run_product_factor(f, x, lambda: y) if parts is None else _add_parts(f, y, x, *parts)


def _add_parts(f: Factors, y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: Any, p: float) -> Tensor:
    """Add the update by plain factors to y, in its memory, and return y.

    If only the vectors train, a kernel applies them around fixed A and B; else they are multiplied into A and B. In the
    first case A, B and the vectors are in autocast's dtype if autocast is on, and x is cast to that of A.
    """
    if f.inner is not None or f.outer is not None:
        if _only_vectors_train(f, A, B):
            A, B, d, b = autocast(x, A, B, f.inner, _outer_times_scale(f))  # type: ignore[arg-type]
            x = cast(x, A.dtype)
            return add_scaled(y, (dropout(x, p) if p else x) @ A.T, B, d, b)
        A, B = absorb_vectors(A, B, f)
    return add_low_rank(y, x, A, B, scale, p)


def run_product_factor(f: Factors, x: Tensor, base: Callable[[], Tensor]) -> Tensor | None:
    """Return the output plus the update by factors with an A that is a `Product`, which is called on x after dropout.

    The update is added in the memory of the output that `base` returns. `inner`, `outer` and `scale` are applied if
    set. A frozen B with an `outer` uses the kernel that gives the vectors' gradients (`add_scaled`).

    Returns None, without calling `base`, for any other A, with a gain, if B has no plain matrix, or if the dropout does
    more than drop a share.

    base: returns the tensor to add to.
    """
    if type(f.A) is not Product or f.gain is not None:
        return None
    (B,), p = factor_tensors(f.B), 0.0 if f.dropout is None else find_dropout_rate(f.dropout)
    if B is None or p is None:
        return None
    h = f.A(dropout(x, p) if p else x)
    if f.outer is not None and not B.requires_grad:
        B, d, b = autocast(h, B, h.new_ones(h.shape[-1]) if f.inner is None else f.inner, _outer_times_scale(f))
        return add_scaled(base(), cast(h, B.dtype), B, d, b)
    h = h if f.inner is None else h * f.inner
    scale = 1.0 if f.scale is None else f.scale
    return add_product(base(), h, B if f.outer is None else f.outer[:, None] * B, scale)


def _only_vectors_train(f: Factors, A: Tensor, B: Tensor) -> bool:
    """Return True if the factors have both vectors, and neither A nor B requires gradients."""
    return f.inner is not None and f.outer is not None and not (A.requires_grad or B.requires_grad)


def _outer_times_scale(f: Factors) -> Tensor:
    """Return the vector `outer` times the scale; `outer` itself if the scale is None."""
    return f.outer if f.scale is None else f.outer * f.scale  # type: ignore[return-value,operator]


def run_with_update(
    layer: Layer, m: Method, delta: Tensor | Unformed | None, bias: Tensor | None, x: Tensor
) -> Tensor | None:
    """Return x (W + ΔW)ᵀ + b + bias by one product.

    Returns None if x has too few rows for that to pay, or if W and x differ in dtype. Returns None if W and the adapter
    differ in dtype, since the sum would round ΔW. A ΔW that is not formed decides that in `linear_with`, and may return
    None. The base layer is not called as a module.

    Args:
        delta: None: the product with W alone, with the changed bias.
        bias: Δb, which becomes the bias if the base has none; None: the bias stays.
    """
    if not worth_it(x) or (W := layer.weight_now).dtype != x.dtype:
        return None
    base, op = layer.base_layer, layer.op
    b = base.bias
    if bias is not None:
        b = bias if b is None else b + bias
    if delta is None:
        return op.call(base, x, W, b) if W.dtype == m.dtype else None
    call, back = partial(op.call, base), op.input_gradient
    if not isinstance(delta, Tensor):
        return delta.linear_with(W, b, x, call, back)
    return one_product.linear_with(W, b, x, one_product.Dense(delta), call, back) if W.dtype == m.dtype else None
