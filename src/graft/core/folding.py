# SPDX-License-Identifier: Apache-2.0
"""The update of one adapter: ΔW and Δb, the same as factors for LoRA, and the fold of an update into a layer's
weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graft.core.effect import HALF, Effect, Factors, Rewrite, Update, factor_matrix, form_delta
from graft.core.errors import RoutingError
from graft.core.lean import find_dropout_rate
from graft.core.method import Layer, Method
from graft.core.ops import Opaque


class EvaluationMode:
    """A context manager that sets `training` of a layer to False, so that merging draws no random numbers (dropout)."""

    def __init__(self, layer: Layer):
        self.attributes = layer.__dict__

    def __enter__(self) -> None:
        """Set the layer's own `training` to False, without its children."""
        self.before = self.attributes["training"]
        self.attributes["training"] = False

    def __exit__(self, *error: object) -> None:
        """Set the layer's `training` to its value before the block."""
        self.attributes["training"] = self.before


def evaluate_delta(layer: Layer, effect: Update) -> Any:
    """Return the result of `effect.delta`: a tensor, or a ΔW that is not formed yet.

    It is called with the layer's W₀ if the effect depends on it. Returns None if the effect has no `delta`.
    """
    if effect.delta is None:
        return None
    return effect.delta(layer.W0) if effect.of_weight else effect.delta()


def compute_delta(layer: Layer, effect: Effect, drops: bool = False, f: Factors | None = None) -> Tensor:
    """Return ΔW, canonical (out, in, *kernel), in the adapter's dtype; of half-precision factors in float32.

    It is the sum of `delta` and the product of the factors, without their gain; zeros, in torch's default dtype on the
    base weight's device, if there is neither.

    Args:
        drops: apply dropout, of the factors and of the effect, to inputs of the update: the same for all rows.
        f: the factors, if they are computed already.

    Raises:
        TypeError: the effect is no `Update`, or one without a weight.
    """
    if not isinstance(effect, Update) or effect.weightless:
        raise TypeError(f"A {type(effect).__name__} of layer '{layer.site.key}' has no ΔW. Merge the adapter instead.")
    if effect.factors is None:
        delta = evaluate_delta(layer, effect)
        W = torch.zeros(layer.site.shape, device=layer.where[0]) if delta is None else form_delta(delta)
    else:
        W = multiply_factors(layer, f or effect.factors(), drops)
        W = W if effect.delta is None else form_delta(evaluate_delta(layer, effect)) + W
    return W * effect.dropout()(torch.ones_like(W[0])) if drops and effect.dropout is not None else W


def multiply_factors(layer: Layer, f: Factors, drops: bool = False) -> Tensor:
    """Return the product B A with `scale`, `inner` and `outer`, but without the gain, by the layer's Op: (out, in,
    *kernel).

    If A is in half precision, both are computed and returned in float32.

    drops: apply the factors' dropout to columns of A, the same for all rows.
    """
    A, B = (drop_inputs_of_A(f) if drops else f).matrices()
    if A.dtype in HALF:
        A, B = A.float(), B.float()
    return layer.op.product(A, B, layer.site.shape)


def why_not_in_weight(m: Method) -> str | None:
    """Return why an adapter has no effect on a weight that modules read without calling the layer; None if it can act.

    The reasons: its effect needs a call of the layer, or has no merged form.
    """
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
    """Return the factors with dropout applied to the columns of A, and without dropout: each row then drops the same
    inputs.

    Returns the factors unchanged if they have no dropout, or if it drops nothing now (p = 0, or evaluation mode).
    """
    if f.dropout is None or find_dropout_rate(f.dropout) == 0:
        return f
    A = factor_matrix(f.A)
    mask = f.dropout(torch.ones_like(A[0]))
    return f._replace(A=A * mask, dropout=None)


def fold_effect(
    layer: Layer, m: Method, effect: Effect, W: Tensor, b: Tensor | None, drops: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return the weight (canonical) and bias of the layer with one more adapter in them; W and b are not changed.

    A `Rewrite` computes both by `merged`; other effects than these two fail an assertion. An `Update` adds ΔW in W's
    dtype, multiplies the rows by a gain, and adds Δb. A bias of None becomes Δb.

    Args:
        drops: let dropout remove inputs of the update, the same for all rows.
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


PLAIN = object()  # a config for `Method.why_incompatible` without any option: plain LoRA


class WeightChange(NamedTuple):
    """ΔW = B A for each group of channels, in float32 or float64, and Δb."""

    A: Tensor  # (groups, r, n); of LoRA on a convolution with groups, n counts the inputs of all groups
    B: Tensor | None  # (groups, out / groups, r); None: A is ΔW itself, of unknown rank
    shift: Tensor | None  # Δb, (out,)


def why_no_delta(m: Method, effect: Effect | None = None) -> str | None:
    """Return why a method has no ΔW on its layer that plain LoRA could add there; None if it has one.

    The first reason counts:

    - No LoRA layer exists for the site's type: it is unknown, or a parameter that is no stack.
    - The method excludes plain LoRA (`why_incompatible`).
    - The effect needs a call of the layer, replaces the layer, or is no `Update` and has no merged form. The text asks
      for the value of the argument that the update depends on, if there is one (`depends_on`).

    A `Rewrite` with a merged form has one: its ΔW is the merged weight minus W₀.

    effect: replaces the method's effect, such as the one at a value of an argument (`Method.effect_at`).
    """
    site, effect = m.site, effect or m.effect
    if (site.op.opaque and len(site.shape) < 3) or not site.op.known:
        return f"no LoRA layer exists for '{site.type_name}'"
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
    """Return the change that a method makes to its layer without other adapters, detached.

    `why_no_delta` must return None for it.

    The layer is in evaluation mode meanwhile, and an offloaded or sharded weight is brought in. Factors stay factors in
    widened dtypes, with the scale in B, per group of a convolution; an A common to all groups is repeated. A stack
    gives one group per matrix, and B None if its pieces return ΔW. Any other ΔW is returned as a matrix, per group,
    with B None. A `Rewrite` gives the difference of merged and present weight and bias. The shift is None for a stack.

    effect: replaces the method's effect.
    """
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
            has_group_rows = len(A) == groups * B.shape[1]  # each group has separate rows of A
            A = A.unflatten(0, (groups, -1)) if has_group_rows else A.expand(groups, *A.shape)
            B = B if f.scale is None else B * f.scale
            return WeightChange(A, B.unflatten(0, (groups, -1)), f.shift())
        if effect.additive:
            W, shift = compute_delta(layer, effect), effect.shift()
        else:
            before, b = widen(layer.W0), layer.bias_now
            W, bias = fold_effect(layer, m, effect, before, b)
            W, shift = W - before, None if bias is b or bias is None else bias if b is None else bias - b
    return WeightChange(widen(W).flatten(1).unflatten(0, (groups, -1)), None, shift)


def widen(t: Tensor) -> Tensor:
    """Return the detached tensor in float32, or in float64 if it is. It shares memory if the dtype stays."""
    t = t.detach()
    return t if t.dtype in (torch.float32, torch.float64) else t.float()


def weigh_steps(
    layer: Layer, steps: Sequence[tuple[Method, Effect]], weights: Mapping[str, float]
) -> list[tuple[Method, Effect]]:
    """Return the steps (method, effect) with each effect multiplied by the weight of its adapter in `weights`.

    An effect without a weight stays. The order stays.

    Raises:
        RoutingError: a weighed adapter does more than add; or tensor parallelism cuts the layer, and a weighed adapter
            does not only add to its output.
    """
    weighed_steps = []
    for m, effect in steps:
        weighed = effect.times(weights[m.name]) if m.name in weights else effect
        if weighed is None:
            raise RoutingError(
                f"Adapter '{m.name}' of layer '{layer.site.key}' ({type(m).__name__}) does more than add to its "
                "output, so that no average can weigh it. Use Stack, or leave it out."
            )
        weighed_steps.append((m, weighed))
    if layer.site.piece is not None and not all([effect.additive for m, effect in weighed_steps if m.name in weights]):
        raise RoutingError(
            f"Layer '{layer.site.key}' is cut by tensor parallelism, where an average takes adapters that only add to "
            "its output. Use Stack."
        )
    return weighed_steps
