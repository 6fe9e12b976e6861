# SPDX-License-Identifier: Apache-2.0
"""Averages of adapters: what each adds to one output, times its weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from graft.core.effect import Branch, Effect, Factors, LowRank, Replace, Rewrite, Tap, Update, not_merged
from graft.core.errors import RoutingError
from graft.core.folding import dense
from graft.core.method import Method
from graft.core.protocols import Layer

ONE_OUTPUT = "in an average its part comes from the output that the others get, too, which no weight does"


class Weighed:
    """A ΔW that is not formed yet, times a number (`Unformed`)."""

    def __init__(self, delta: Any, weight: float):
        self.delta, self.weight = delta, weight

    def dense(self) -> Tensor:
        return dense(self.delta) * self.weight

    def columns(self, ids: Tensor) -> Tensor:
        columns: Tensor = self.delta.columns(ids)
        return columns * self.weight

    def product(self, x: Tensor) -> Tensor | None:
        y: Tensor | None = self.delta.product(x)
        return None if y is None else y * self.weight

    def linear_with(self, *_: object) -> None:
        return None


def weighed_factors(factors: Callable[[], Factors], weight: float) -> Callable[[], Factors]:
    def run() -> Factors:
        f = factors()
        return f._replace(scale=weight if f.scale is None else f.scale * weight)

    return run


def times(function: Callable[..., object], weight: float) -> Callable[..., Any]:
    """Return the function, whose tensor (or ΔW not formed yet) counts `weight` times."""

    def run(*args: object) -> Any:
        value = function(*args)
        return value * weight if isinstance(value, Tensor) else Weighed(value, weight)

    return run


def weighed(layer: Layer, m: Method, effect: Effect, weight: float) -> Effect:
    """Return an effect that adds `weight` times what this one adds.

    Raises:
        RoutingError: it does more than add.
    """
    if isinstance(effect, LowRank) and not effect.gains:
        return replace(effect, factors=weighed_factors(effect.factors, weight))
    if isinstance(effect, Update):
        return replace(
            effect,
            delta=None if effect.delta is None else times(effect.delta, weight),
            branch=None if effect.branch is None else times(effect.branch, weight),
            beside=None if effect.beside is None else weighed_factors(effect.beside, weight),
            bias=None if effect.bias is None else times(effect.bias, weight),
        )
    if isinstance(effect, Branch):
        return replace(effect, branch=times(effect.branch, weight))
    if isinstance(effect, Rewrite) and effect.weighable:
        assert effect.part is not None
        fixed = effect.fixed or ONE_OUTPUT
        return replace(effect, part=times(effect.part, weight), post=None, merged=not_merged, fixed=fixed)
    if isinstance(effect, Tap) or (isinstance(effect, Replace) and effect.aside):
        return effect
    raise RoutingError(
        f"Adapter '{m.name}' of layer '{layer.site.key}' ({type(m).__name__}) does more than add to its output, so "
        "that no average can weigh it: use Stack, or leave it out."
    )


def averaged(
    layer: Layer, steps: Sequence[tuple[Method, Effect]], weights: Mapping[str, float]
) -> list[tuple[Method, Effect]]:
    """Return the steps of adapters, each with its weight; one that has none counts whole.

    Raises:
        RoutingError: an adapter does more than add, or processes hold pieces of the layer, on which parts are nested.
    """
    own = [(m, weighed(layer, m, effect, weights.get(m.name, 1.0))) for m, effect in steps]
    if layer.site.piece is not None and not all([effect.additive for _, effect in own]):
        raise RoutingError(
            f"Layer '{layer.site.key}' is cut by tensor parallelism, where an average takes adapters that only add to "
            "its output: use Stack."
        )
    return own
