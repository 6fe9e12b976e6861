# SPDX-License-Identifier: Apache-2.0
"""The part that one adapter adds to the output of its layer.

`ADD` adds it to an output, by the type of effect; `JOIN` runs the base layer as well, so that one kernel can do both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from graft.core import fused
from graft.core.dropout import share_dropped
from graft.core.effect import Branch, Effect, Factors, LowRank, Unformed, Update
from graft.core.face import Layer
from graft.core.folding import dense, formed
from graft.core.method import Method
from graft.kernels.eager import eager


def forms(effect: Effect) -> bool:
    """Say whether what an adapter adds is computed from a tensor as large as the weight."""
    if isinstance(effect, LowRank):
        return effect.of_weight and not effect.gains
    return isinstance(effect, Update) and effect.delta is not None and effect.branch is None


def again(layer: Layer, run: Callable[..., Tensor], *args: Any) -> Tensor:
    """Return run(*args); compute it again in the backward pass."""
    if not (torch.is_grad_enabled() and eager()):
        return run(*args)
    out: Tensor = checkpoint(run, *args, use_reentrant=False, preserve_rng_state=layer.training)
    return out


def low_rank_part(layer: Layer, m: Method, f: Factors, x: Tensor) -> Tensor:
    """Return scale · outer ⊙ B (inner ⊙ A dropout(x)); call modules one by one."""
    op, base, A, B = layer.op, layer.base_layer, f.A, f.B
    x = m.cast(x)
    if f.dropout is not None and not op.takes_ids:
        x = f.dropout(x)
    by_tensors = isinstance(A, Tensor)
    if by_tensors and not op.factorable(base):
        return op.call(base, x, op.product(*f.matrices(), layer.site.shape), f.shift())
    z = op.down(base, x, A) if by_tensors else A(x)
    if f.inner is not None:
        z = z * op.channels(f.inner)
    z = op.up(base, z, B) if isinstance(B, Tensor) else B(z)
    if f.outer is not None:
        z = z * op.channels(f.outer)
    return z if f.scale is None else z * f.scale


def update_part(layer: Layer, m: Method, effect: Update, x: Tensor) -> Tensor:
    """Return ΔW dropout(x) + Δb."""
    op = layer.op
    x = m.cast(x)
    if effect.dropout is not None and not op.takes_ids:
        x = effect.dropout()(x)
    bias = None if effect.bias is None else effect.bias()
    if effect.branch is not None:
        y = effect.branch(x)
        return y if bias is None else y + op.channels(bias)
    y = applied(layer, m, formed(layer, effect), bias, x)
    return y if effect.beside is None else y + low_rank_part(layer, m, effect.beside(), x)


def applied(layer: Layer, m: Method, delta: Tensor | Unformed | None, bias: Tensor | None, x: Tensor) -> Tensor:
    """Return ΔW x + Δb. Of a ΔW that is not formed yet, form only columns that ids name, or nothing where that pays."""
    op, base = layer.op, layer.base_layer
    if delta is None:
        assert bias is not None  # an Update has one of them
        return op.channels(bias)
    if not isinstance(delta, Tensor):
        if op.takes_ids:
            return op.scaled(base, delta.columns(x).to(m.dtype))
        y = delta.product(x) if op.linear else None
        if y is not None:
            return y if bias is None else y + bias
    delta = dense(delta).to(m.dtype)
    return op.down(base, x, delta) if op.takes_ids else op.call(base, x, delta, bias)


def part_of(layer: Layer, m: Method, effect: Effect, x: Tensor) -> Tensor:
    """Return the part that an additive adapter adds to the output."""
    if not layer.store.exact and forms(effect):
        return again(layer, _part_of, layer, m, effect, x)
    return _part_of(layer, m, effect, x)


def _part_of(layer: Layer, m: Method, effect: Effect, x: Tensor) -> Tensor:
    if isinstance(effect, LowRank):
        return low_rank_part(layer, m, effect.factors(), x)
    if isinstance(effect, Update):
        return update_part(layer, m, effect, x)
    assert isinstance(effect, Branch)
    return effect.branch(m.cast(x))


Add = Callable[[Any, Any, Any, Tensor, Tensor, bool], Tensor]  # (layer, method, effect, x, y, may it write to y?)


def add_low_rank(layer: Layer, m: Method, effect: LowRank, x: Tensor, y: Tensor, fuse: bool) -> Tensor:
    return add_factors(layer, m, effect.factors(), x, y, fuse)


def add_factors(layer: Layer, m: Method, f: Factors, x: Tensor, y: Tensor, fuse: bool) -> Tensor:
    out = fused.added(f, x, y) if fuse else None
    return y + low_rank_part(layer, m, f, x) if out is None else out


def add_update(layer: Layer, m: Method, effect: Update, x: Tensor, y: Tensor, fuse: bool) -> Tensor:
    return y + update_part(layer, m, effect, x)


def add_branch(layer: Layer, m: Method, effect: Branch, x: Tensor, y: Tensor, fuse: bool) -> Tensor:
    return y + effect.branch(m.cast(x))


def add_part(layer: Layer, m: Method, effect: Effect, x: Tensor, y: Tensor, fuse: bool) -> Tensor:
    return y + part_of(layer, m, effect, x)


ADD: dict[type, Add] = {LowRank: add_low_rank, Update: add_update, Branch: add_branch}


def join_low_rank(layer: Layer, m: Method, effect: LowRank, x: Tensor) -> Tensor:
    f = effect.factors()
    out = fused.joined(layer, f, x)
    if out is not None:
        return out
    y: Tensor = layer.base_layer(x)
    return (y + low_rank_part(layer, m, f, x)).to(y.dtype)


def join_update(layer: Layer, m: Method, effect: Update, x: Tensor) -> Tensor:
    if effect.branch is None and (effect.dropout is None or share_dropped(effect.dropout()) == 0):
        delta = formed(layer, effect)
        bias = None if effect.bias is None else effect.bias()
        out = fused.updated(layer, delta, bias, x, m.dtype)
        if out is None:
            y: Tensor = layer.base_layer(x)
            out = (y + applied(layer, m, delta, bias, m.cast(x))).to(y.dtype)
        if effect.beside is not None:
            out = add_factors(layer, m, effect.beside(), x, out, True).to(out.dtype)
        return out
    y = layer.base_layer(x)
    return (y + update_part(layer, m, effect, x)).to(y.dtype)


def join_branch(layer: Layer, m: Method, effect: Branch, x: Tensor) -> Tensor:
    y: Tensor = layer.base_layer(x)
    return (y + effect.branch(m.cast(x))).to(y.dtype)


JOIN: dict[type, Callable[[Any, Any, Any, Tensor], Tensor]] = {
    LowRank: join_low_rank,
    Update: join_update,
    Branch: join_branch,
}
