# SPDX-License-Identifier: Apache-2.0
"""Planning: the order in which the adapters of a layer act, and which plan runs them.

An adapter acts on the layer that those before it made: y = mₙ(… m₁(base)). Methods stand in the order in which they
came to the layer, adapters of one method in that of their activation (inward ones in reverse). Inputs go from the
outside in, outputs come back; folding weights in the same order gives the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from graft.core import fused
from graft.core.effect import Branch, LowRank, Rewrite
from graft.core.face import Layer
from graft.core.folding import same_inputs
from graft.core.method import Method
from graft.core.ops import Opaque
from graft.core.part import part_of
from graft.core.plan import Chain, Plan, Step, Sum, refuse_gates
from graft.kernels.eager import eager, watched
from graft.kernels.summed import summed


class Folded(Plan):
    """A weight that only its module knows how to use: fold, then call the module with the folded weight.

    A sum of products is not formed: the module gets a tensor that stands for it, so that of a stack only the matrices
    in use cost anything.
    """

    def __init__(self, layer: Layer, steps: Sequence[Step]):
        super().__init__(layer, steps)
        assert isinstance(layer.op, Opaque)
        self.op = layer.op
        self.products = [effect for _, effect in self.steps if isinstance(effect, LowRank) and effect.additive]

    def run(self, *args: Any, **kwargs: Any) -> Any:
        layer = self.layer
        if layer.call.open:
            refuse_gates(layer)
        W = self.stand_in()
        return self.op.apply(layer, args, kwargs, self.op.uncanon(self.folded_now()[0]) if W is None else W)

    def stand_in(self) -> Any:
        """Return a tensor that stands for the sum; None where operations do not run as written."""
        layer = self.layer
        if len(self.products) < len(self.steps) or not eager() or watched():
            return None
        op, W = self.op, layer.weight_now
        if type(W) not in fused.PLAIN or W.dim() < 2:
            return None
        parts = []
        for effect in self.products:
            A, B = same_inputs(effect.factors()).matrices()
            parts.append((*(op.each(A, B, len(W)) if W.dim() > 2 else (A, B)), 1.0))
        return summed(W, parts, op.transposed)


class Whole(Plan):
    """A module with several inputs that returns a tuple, to whose first item adapters add."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        y, *others = self.layer.base_layer(*args, **kwargs)
        return self.add(self.input(args, kwargs), y), *others

    def input(self, args: Any, kwargs: dict[str, Any]) -> Tensor:
        names = self.layer.argument_names
        effect: Any = self.steps[0][1]
        x: Tensor = effect.input_of(self.layer.base_layer, {**dict(zip(names, args)), **kwargs})
        return x

    def add(self, x: Tensor, y: Tensor, fuse: bool = False, first: int = 0) -> Tensor:
        gates = self.layer.call.weights() if self.layer.call.open else None
        for m, effect in self.steps[first:]:
            part = part_of(self.layer, m, effect, x)
            y = y + (part if gates is None else gates.apply(self.layer, m.name, part))
        return y


class Block(Plan):
    """A module with several inputs, before and after which adapters act."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        x, call = self.input(args, kwargs)
        inner, given = self.before(x)
        return with_first(call(inner), lambda y: self.after(given, y))

    def input(self, args: Any, kwargs: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        """Return the first input, and the module as a function of it."""
        layer = self.layer
        if args:
            return args[0], lambda x: layer.base_layer(x, *args[1:], **kwargs)
        name = layer.argument_names[0]
        return kwargs[name], lambda x: layer.base_layer(**{**kwargs, name: x})

    def before(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the input that the module gets, and what each step got."""
        given = []
        for _, effect in reversed(self.steps):
            given.append(x)
            x = effect.pre(x).to(x.dtype)  # type: ignore[attr-defined]
        return x, given[::-1]

    def after(self, given: list[Tensor], y: Tensor) -> Tensor:
        """Return the output, from the module's."""
        for (_, effect), x in zip(self.steps, given):
            y = effect.post(x, y).to(y.dtype)  # type: ignore[attr-defined]
        return y


def with_first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return the output of a module with its tensor, or the first item of its tuple, changed."""
    return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])


class Instead(Plan):
    """A module that runs in place of the layer."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if self.layer.call.open:
            refuse_gates(self.layer)
        return self.module(*args, **kwargs)

    @property
    def module(self) -> Any:
        effect: Any = self.steps[0][1]
        return effect.module()

    def folded_now(self) -> tuple[Tensor, Tensor | None]:
        module = self.module
        return self.layer.op.canon(module.weight), self.bias()

    def bias(self, n: int | None = None) -> Tensor | None:
        return getattr(self.module, "bias", None)


def ordered(layer: Layer, methods: Iterable[Method]) -> list[Step]:
    """Return the steps of these methods of a layer, the innermost first."""
    kinds = layer.kinds
    rank = {kind: i for i, kind in enumerate(kinds)}
    groups: dict[int, list[Step]] = {}
    for m in methods:
        effect = m.effect
        steps = groups.setdefault(rank[m.config], [])
        if effect.inward:
            steps.insert(0, (m, effect))
        else:
            steps.append((m, effect))
    if len(groups) == 1:
        return next(iter(groups.values()))
    return [step for i in sorted(groups) for step in groups[i]]


def plan_of(layer: Layer, names: Sequence[str]) -> Plan | None:
    """Return the plan for those of `names` that the layer carries; None if it carries none."""
    methods = [layer.methods[n] for n in names if n in layer.methods]
    if not methods:
        return None
    steps = ordered(layer, methods)
    effects = [effect for _, effect in steps]
    kind: type[Plan]
    if layer.op.opaque:
        kind = Folded
    elif any(e.whole for e in effects):
        kind = Instead
    elif any(isinstance(e, Branch) and e.input_of for e in effects):
        kind = Whole
    elif any(isinstance(e, Rewrite) and e.block for e in effects):
        kind = Block
    else:
        kind = Sum if all(e.additive for e in effects) else Chain
    if layer.site.piece is not None:
        kind = layer.site.piece.plans.get(kind, kind)
    return kind(layer, steps)
