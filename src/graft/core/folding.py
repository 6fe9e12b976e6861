# SPDX-License-Identifier: Apache-2.0
"""What adapters do to a weight: ΔW and Δb of one, alone or as LoRA holds it, and folding them into a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graft.core.effect import HALF, Effect, Factors, Rewrite, Update, factor_matrix, form_delta
from graft.core.errors import RoutingError
from graft.core.lean import find_dropout_rate
from graft.core.method import Method
from graft.core.ops import Opaque
from graft.core.protocols import Layer


class EvaluationMode:
    """A block in which a layer's adapters do not train, so that merging takes up nothing random."""

    def __init__(self, layer: Layer):
        self.attributes = layer.__dict__

    def __enter__(self) -> None:
        self.before = self.attributes["training"]
        self.attributes["training"] = False

    def __exit__(self, *error: object) -> None:
        self.attributes["training"] = self.before


def evaluate_delta(layer: Layer, effect: Update) -> Any:
    """Return ΔW as the adapter gives it: a tensor, or a value that is not formed yet; None if there is none."""
    if effect.delta is None:
        return None
    return effect.delta(layer.W0) if effect.of_weight else effect.delta()


def compute_delta(layer: Layer, effect: Effect, drops: bool = False, f: Factors | None = None) -> Tensor:
    """Return ΔW, canonical, in the adapter's dtype; products of half precision in float32.

    Args:
        drops: let the dropout of factors take out inputs of the update, the same for all rows.
        f: its factors, if they are made already.
    """
    if not isinstance(effect, Update) or effect.weightless:
        raise TypeError(f"a {type(effect).__name__} has no ΔW")
    if effect.factors is None:
        delta = evaluate_delta(layer, effect)
        W = torch.zeros(layer.site.shape, device=layer.where[0]) if delta is None else form_delta(delta)
    else:
        W = multiply_factors(layer, f or effect.factors(), drops)
        W = W if effect.delta is None else form_delta(evaluate_delta(layer, effect)) + W
    return W * effect.dropout()(torch.ones_like(W[0])) if drops and effect.dropout is not None else W


def multiply_factors(layer: Layer, f: Factors, drops: bool = False) -> Tensor:
    """Return the canonical product of factors, but for their gain."""
    A, B = (drop_inputs_of_A(f) if drops else f).matrices()
    if A.dtype in HALF:
        A, B = A.float(), B.float()
    return layer.op.product(A, B, layer.site.shape)


def why_not_in_weight(m: Method) -> str | None:
    """Return why an adapter cannot act through a weight that modules read without calling the layer, if so."""
    effect, name = m.effect, type(m).__name__
    if effect.weightless:
        return f"The weight is used without a call of the layer, so that {name} would have no effect"
    if effect.why_unmergeable is not None:
        return (
            f"The weight is used without a call of the layer, and {name} has no weight to put there: "
            f"{effect.why_unmergeable}"
        )
    return None


def drop_inputs_of_A(f: Factors) -> Factors:
    """Return factors whose dropout has taken columns out of A, in training: the same inputs of all rows."""
    if f.dropout is None or find_dropout_rate(f.dropout) == 0:
        return f
    A = factor_matrix(f.A)
    mask = f.dropout(torch.ones_like(A[0]))
    return f._replace(A=A * mask, dropout=None)


def fold_effect(
    layer: Layer, m: Method, effect: Effect, W: Tensor, b: Tensor | None, drops: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return weight (canonical) and bias of the layer with one more adapter on it.

    drops: let dropout take out inputs of the update, the same for all rows.
    """
    if isinstance(effect, Rewrite):
        return effect.merged(W, b)
    assert isinstance(effect, Update)
    f = None if effect.factors is None else effect.factors()
    if not effect.keeps_weight:
        W = W + compute_delta(layer, effect, drops, f).to(W.dtype)
    if f is not None and f.gain is not None:
        W = W * f.gain.to(W.dtype).view(-1, *[1] * (W.dim() - 1))
    shift = effect.shift(f)
    if shift is not None:
        b = shift if b is None else b + shift.to(b.dtype)
    return W, b


PLAIN = object()  # stands for the config of an adapter that asks for nothing: plain LoRA


class WeightChange(NamedTuple):
    """ΔW = B A in each group of channels, in float32 at least, and Δb."""

    A: Tensor  # (groups, r, n); of LoRA on a convolution with groups, n counts the inputs of all groups
    B: Tensor | None  # (groups, out / groups, r); None: A is ΔW itself, whose rank is not known
    shift: Tensor | None  # Δb, (out,)


def why_no_delta(m: Method, effect: Effect | None = None) -> str | None:
    """Return why a method has no ΔW on its layer that plain LoRA could add there; None if it has one.

    effect: stands for the method's effect, at one value of an argument (`Method.effect_at`).

    A `Rewrite` has f(W₀) - W₀, where f makes the merged weight.
    """
    site, effect = m.site, effect or m.effect
    if (site.op.opaque and len(site.shape) < 3) or not site.op.known:
        return f"no LoRA layer stands for '{site.type_name}'"
    why = m.why_incompatible(PLAIN)
    if why is not None:
        return str(why)
    if not (effect.weightless or effect.whole) and (isinstance(effect, Update) or effect.why_unmergeable is None):
        return None
    if m.depends_on is not None:
        return f"its update follows `{m.depends_on}` of a call: say which, at={{'{m.depends_on}': …}}"
    return f"{type(m).__name__} does not add to the weight"


@torch.no_grad()
def compute_change(m: Method, effect: Effect | None = None) -> WeightChange:
    """Return the change that a method makes to its layer without other adapters, which `why_no_delta` has allowed."""
    layer, effect, op = m.layer, effect or m.effect, m.site.op
    groups = op.count_groups(m.site.module)
    with layer.base_weight.bring_in(layer), EvaluationMode(layer):
        if effect.pieces is not None:
            pieces, experts = effect.pieces(), range(layer.site.shape[0])
            changes = [pieces.change(e, [t[e] for t in pieces.tensors], None, None, False) for e in experts]
            A, *Bs = (torch.stack([widen(t) for t in tensors_of_all]) for tensors_of_all in zip(*changes))
            return WeightChange(A, Bs[0] if Bs else None, None)
        if effect.product is not None:
            f = effect.product()
            A, B = (widen(t) for t in f.matrices_without_scale())
            if op.opaque:  # a stack
                A, B = Opaque.split_matrices(A, B, layer.site.shape[0])
                return WeightChange(A, B if f.scale is None else B * f.scale, None)
            has_group_rows = len(A) == groups * B.shape[1]  # each group has rows of A for itself
            return WeightChange(
                A.unflatten(0, (groups, -1)) if has_group_rows else A.expand(groups, *A.shape),
                (B if f.scale is None else B * f.scale).unflatten(0, (groups, -1)),
                f.shift(),
            )
        if effect.additive:
            W, shift = compute_delta(layer, effect), effect.shift()
        else:
            before, b = widen(layer.W0), layer.bias_now
            W, bias = fold_effect(layer, m, effect, before, b)
            W, shift = W - before, None if bias is b or bias is None else bias if b is None else bias - b
    return WeightChange(widen(W).flatten(1).unflatten(0, (groups, -1)), None, shift)


def widen(t: Tensor) -> Tensor:
    """Return the values, in float32 at least."""
    t = t.detach()
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


def weigh_effect(layer: Layer, m: Method, effect: Effect, weight: float) -> Effect:
    """Return an effect that adds `weight` times what this one adds.

    Raises:
        RoutingError: it does more than add.
    """
    weighed_effect = effect.times(weight)
    if weighed_effect is None:
        raise RoutingError(
            f"Adapter '{m.name}' of layer '{layer.site.key}' ({type(m).__name__}) does more than add to its output, so "
            "that no average can weigh it: use Stack, or leave it out."
        )
    return weighed_effect


def weigh_steps(
    layer: Layer, steps: Sequence[tuple[Method, Effect]], weights: Mapping[str, float]
) -> list[tuple[Method, Effect]]:
    """Return the steps of adapters, those with a weight times it; the others as they are.

    Raises:
        RoutingError: an adapter does more than add, or processes hold pieces of the layer, on which parts are nested.
    """
    weighed_steps = [
        (m, weigh_effect(layer, m, effect, weights[m.name]) if m.name in weights else effect) for m, effect in steps
    ]
    if layer.site.piece is not None and not all([effect.additive for m, effect in weighed_steps if m.name in weights]):
        raise RoutingError(
            f"Layer '{layer.site.key}' is cut by tensor parallelism, where an average takes adapters that only add to "
            "its output: use Stack."
        )
    return weighed_steps
