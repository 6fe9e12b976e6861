# SPDX-License-Identifier: Apache-2.0
"""Planning: the order in which the adapters of a layer act, and which plan runs them.

An adapter acts on the layer that those before it made: y = mₙ(… m₁(base)). Methods stand in the order in which they
came to the layer, adapters of one method in that of their activation (inward ones in reverse). Inputs go from the
outside in, outputs come back; folding weights in the same order gives the same function.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from graft.core.effect import Branch, Rewrite
from graft.core.face import Layer
from graft.core.method import Method
from graft.core.module_plans import Block, Folded, Instead, Whole
from graft.core.plan import Chain, Plan, Step, Sum


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
