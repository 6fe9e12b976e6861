# SPDX-License-Identifier: Apache-2.0
"""Plans: the work of a layer with its active adapters. The layer decides it when they change, and runs it at each call.

Here are the plans of a layer of one input: a sum of what adapters add, or a chain of adapters, one around the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from graft.core import fused
from graft.core.dropout import share_dropped
from graft.core.effect import Effect, Factors, LowRank, Rewrite
from graft.core.errors import RoutingError
from graft.core.face import Layer
from graft.core.folding import fold_step, shift_of
from graft.core.method import Method
from graft.core.part import ADD, JOIN, add_part, again, low_rank_part, part_of
from graft.kernels.low_rank import dropout

Step = tuple[Method, Effect]  # (method, its effect)


class Plan:
    """Base of the plans. steps: the innermost first."""

    def __init__(self, layer: Layer, steps: Sequence[Step]):
        self.layer, self.steps = layer, list(steps)

    def run(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def over(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y, the output for x of what is beneath them, with the steps on it: of a plan of one adapter."""
        raise NotImplementedError(
            f"Adapter '{self.steps[0][0].name}' of layer '{self.layer.site.key}' acts on more than an output: call the "
            "original forward in its place."
        )

    def fold(self, W: Tensor, b: Tensor | None, n: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Return weight (canonical) and bias of a plain layer that acts as base and (first n) adapters together."""
        for m, effect in self.steps[:n]:
            W, b = fold_step(self.layer, m, effect, W, b)
        return W, b

    def folded_now(self) -> tuple[Tensor, Tensor | None]:
        """Return weight (canonical) and bias with which the module runs, which uses them in ways of its own.

        There dropout takes out the same inputs for all rows of a call.
        """
        layer = self.layer
        W, b = layer.weight_now, None if layer.op.opaque else layer.bias_now
        for m, effect in self.steps:
            W, b = fold_step(layer, m, effect, W, b, drops=True)
        return W, b

    def bias(self, n: int | None = None) -> Tensor | None:
        """Return the bias of the layer with the (first n) steps on it."""
        b = self.layer.bias_now
        if any(isinstance(e, Rewrite) and not (e.pre and not e.post) for _, e in self.steps[:n]):
            return self.fold(self.layer.weight_now, b, n)[1]
        for _, effect in self.steps[:n]:
            shift = shift_of(effect)
            if shift is not None:
                b = shift if b is None else b + shift
        return b


class Sum(Plan):
    """Adapters that only add to the output."""

    def __init__(self, layer: Layer, steps: Sequence[Step]):
        super().__init__(layer, steps)
        exact = layer.store.exact
        self.adds = [(ADD[type(effect)] if exact else add_part, m, effect) for m, effect in self.steps]
        self.join = JOIN[type(self.steps[0][1])]
        self.single = len(self.steps) == 1

    def run(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer = self.layer
        if layer.call.open and layer.call.weights() is not None:
            return self.gated(x, layer.store.protect(layer.base_layer(x, *args, **kwargs)))
        fuse = layer.may_fuse
        if fuse and not (args or kwargs) and not (torch.is_grad_enabled() and layer.base_trains):
            m, effect = self.steps[0]
            y = self.join(layer, m, effect, x)
            return y if self.single else self.add(x, y, True, 1)
        return self.add(x, layer.store.protect(layer.base_layer(x, *args, **kwargs)), fuse)

    def add(self, x: Tensor, y: Tensor, fuse: bool, first: int = 0) -> Tensor:
        """Add the parts of the steps from `first` on to y. fuse: write to y, and pass modules without hooks by."""
        dtype = y.dtype
        for add, m, effect in self.adds[first:]:
            y = add(self.layer, m, effect, x, y, fuse)
        return y.to(dtype)

    def over(self, x: Tensor, y: Tensor) -> Tensor:
        return self.add(x, y, False)

    def gated(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y with the parts of all steps, weighed by the gates of the call."""
        dtype, gates = y.dtype, self.layer.call.weights()
        for m, effect in self.steps:
            y = y + gates.apply(self.layer, m.name, self.part(m, effect, x))
        return y.to(dtype)

    def part(self, m: Method, effect: Effect, x: Tensor) -> Tensor:
        """Return the part that a step adds to the output."""
        return part_of(self.layer, m, effect, x)


class Chain(Plan):
    """Adapters each of which acts on the layer that those before it made."""

    def __init__(self, layer: Layer, steps: Sequence[Step]):
        super().__init__(layer, steps)
        self.ways = [WAYS[way(effect)] for _, effect in self.steps]

    def run(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.layer.call.open:
            refuse_gates(self.layer)
        return self.through(len(self.steps), x, args, kwargs)

    def through(self, n: int, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        """Return the output of the layer with the first n steps on it."""
        if n == 0:
            return self.layer.store.protect(self.layer.base_layer(x, *args, **kwargs))
        m, effect = self.steps[n - 1]
        return self.ways[n - 1](self, n - 1, m, effect, x, args, kwargs)

    def over(self, x: Tensor, y: Tensor) -> Tensor:
        m, effect = self.steps[0]
        if not (isinstance(effect, LowRank) and effect.gains):
            return super().over(x, y)
        return _gained(self, 0, m, effect.factors(), x, y, lambda inner: self.through(0, inner, (), {}), False)

    # what a layer of which a process computes a piece does in another way

    def part(self, m: Method, effect: Effect, x: Tensor) -> Tensor:
        """Return the part that an additive step adds to the output."""
        return part_of(self.layer, m, effect, x)

    def low_rank(self, m: Method, f: Factors, x: Tensor) -> Tensor:
        return low_rank_part(self.layer, m, f, x)

    def call(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """Return the module's output with another (canonical) weight and bias."""
        return self.layer.op.call(self.layer.base_layer, x, W, b)

    def channels(self, v: Tensor) -> Tensor:
        return self.layer.op.channels(v)

    def dropped(self, module: Any, x: Tensor) -> Tensor:
        p = share_dropped(module)
        return module(x) if p is None else dropout(x, p)


def way(effect: Effect) -> str:
    """Return the key in `WAYS` of the function that runs a step of a chain."""
    if isinstance(effect, Rewrite):
        return "fold" if effect.folds else "rewrite"
    return "gain" if isinstance(effect, LowRank) and effect.gains else "add"


def _rewrite(plan: Chain, n: int, m: Method, effect: Rewrite, x: Tensor, args: Any, kwargs: Any) -> Tensor:
    inner = x if effect.pre is None else effect.pre(x).to(x.dtype)
    y = plan.through(n, inner, args, kwargs)
    if effect.post is None:
        return y
    b = plan.bias(n) if effect.apart else None
    if b is None:
        return effect.post(x, y).to(y.dtype)
    b = plan.layer.op.channels(b)
    return (effect.post(x, y - b) + b).to(y.dtype)


def _fold(plan: Chain, n: int, m: Method, effect: Rewrite, x: Tensor, args: Any, kwargs: Any) -> Tensor:
    """Run the layer's own function with the folded weight: nothing else sees the patches that a kernel sees."""
    if not plan.layer.store.exact:
        return again(plan.layer, _with_folded, plan, n, x)
    return _with_folded(plan, n, x)


def _with_folded(plan: Chain, n: int, x: Tensor) -> Tensor:
    layer, op = plan.layer, plan.layer.op
    W, b = layer.weight_now, layer.bias_now
    out = W.dtype if op.takes_ids else x.dtype
    for method, step in plan.steps[: n + 1]:
        W, b = fold_step(layer, method, step, W.to(method.dtype), None if b is None else b.to(method.dtype))
    y = plan.call(x if op.takes_ids else x.to(W.dtype), W, b)
    return y.to(out) if y.dtype == W.dtype else y  # autocast chose another


def _add(plan: Chain, n: int, m: Method, effect: Effect, x: Tensor, args: Any, kwargs: Any) -> Tensor:
    y = plan.through(n, x, args, kwargs)
    return (y + plan.part(m, effect, x)).to(y.dtype)


def _gain(plan: Chain, n: int, m: Method, effect: LowRank, x: Tensor, args: Any, kwargs: Any) -> Tensor:
    layer, f = plan.layer, effect.factors()
    fuse = n == 0 and layer.may_fuse
    if fuse and not (args or kwargs) and not (torch.is_grad_enabled() and layer.base_trains):
        joined = fused.joined(layer, f, x)
        if joined is not None:
            return joined
    y = plan.through(n, x, args, kwargs)
    return _gained(plan, n, m, f, x, y, lambda inner: plan.through(n, inner, args, kwargs), fuse)


def _gained(
    plan: Chain, n: int, m: Method, f: Factors, x: Tensor, y: Tensor, beneath: Callable[[Tensor], Tensor], fuse: bool
) -> Tensor:
    """Return b + gain ⊙ (y - b + ΔW x). Dropout acts on x in both products, and not in y itself.

    Args:
        beneath: what has made y of x.
        fuse: a kernel may write to y.
    """
    op = plan.layer.op
    assert f.gain is not None
    gain = plan.channels(f.gain)
    p = 0.0 if op.takes_ids or f.dropout is None else share_dropped(f.dropout)
    rest = None
    if p != 0:
        kept = plan.dropped(f.dropout, x)
        product = beneath(kept)
        rest = y - product
        z = product + plan.low_rank(m, f._replace(dropout=None), kept)
    elif fuse and y.dtype == m.dtype:
        added = fused.added(f, x, y)
        z = y + plan.low_rank(m, f, x) if added is None else added
    else:  # rounds once, at the end
        z = y + plan.low_rank(m, f, x)
    out, b = z * gain, plan.bias(n)
    if b is not None:
        out = out + plan.channels(b) * (1 - gain)
    return (out if rest is None else out + rest).to(y.dtype)


WAYS: dict[str, Callable[..., Tensor]] = {"rewrite": _rewrite, "fold": _fold, "add": _add, "gain": _gain}


def refuse_gates(layer: Layer) -> None:
    """Raise if the call has gates."""
    if layer.call.weights() is None:
        return
    raise RoutingError(
        f"Adapters of layer '{layer.site.key}' do more than add to its output, so that gates (of a mixture) cannot "
        "weigh them: leave them out of the mixture, or deactivate them."
    )
