# SPDX-License-Identifier: Apache-2.0
"""Averages of adapters: what each adds to one output, times its weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from graft.core.effect import Effect
from graft.core.errors import RoutingError
from graft.core.method import Method
from graft.core.protocols import Layer


def weighed(layer: Layer, m: Method, effect: Effect, weight: float) -> Effect:
    """Return an effect that adds `weight` times what this one adds.

    Raises:
        RoutingError: it does more than add.
    """
    made = effect.times(weight)
    if made is None:
        raise RoutingError(
            f"Adapter '{m.name}' of layer '{layer.site.key}' ({type(m).__name__}) does more than add to its output, so "
            "that no average can weigh it: use Stack, or leave it out."
        )
    return made


def averaged(
    layer: Layer, steps: Sequence[tuple[Method, Effect]], weights: Mapping[str, float]
) -> list[tuple[Method, Effect]]:
    """Return the steps of adapters, those with a weight times it; the others as they are.

    Raises:
        RoutingError: an adapter does more than add, or processes hold pieces of the layer, on which parts are nested.
    """
    own = [(m, weighed(layer, m, effect, weights[m.name]) if m.name in weights else effect) for m, effect in steps]
    if layer.site.piece is not None and not all([effect.additive for m, effect in own if m.name in weights]):
        raise RoutingError(
            f"Layer '{layer.site.key}' is cut by tensor parallelism, where an average takes adapters that only add to "
            "its output: use Stack."
        )
    return own
