# SPDX-License-Identifier: Apache-2.0
"""The change that an adapter makes to the weight of its layer, by itself: to sum it up, or to hold it as LoRA."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from graft.core.effect import LowRank, Rewrite, Update
from graft.core.folding import delta_of, evaluating, fold_step, shift_of

PLAIN = object()  # stands for the config of an adapter that asks for nothing: plain LoRA


class Change(NamedTuple):
    """ΔW = B A in each group of channels, in float32 at least, and Δb."""

    A: Tensor  # (groups, r, n); of LoRA on a convolution with groups, n counts the inputs of all groups
    B: Tensor | None  # (groups, out / groups, r); None: A is ΔW itself, whose rank is not known
    shift: Tensor | None  # Δb, (out,)


def why_none(m: Any) -> str | None:
    """Say why a method has no ΔW on its layer that plain LoRA could add there; None if it has one.

    A `Rewrite` that gives nothing but a new weight f(W) has one, f(W₀) - W₀; one that acts on inputs and outputs has a
    merged form at most.
    """
    site, effect = m.site, m.effect
    if site.op.opaque or not site.op.known:
        return f"no LoRA layer stands for '{site.type_name}'"
    why = m.excludes(PLAIN)
    if why is not None:
        return str(why)
    if isinstance(effect, (LowRank, Update)) or (isinstance(effect, Rewrite) and effect.folds):
        return None
    return f"{type(m).__name__} does not add to the weight"


@torch.no_grad()
def change_of(m: Any) -> Change:
    """Return the change that a method makes to its layer without other adapters, which `why_none` has allowed."""
    layer, effect, op = m.layer, m.effect, m.site.op
    groups = op.groups(m.site.module)
    with layer.store.at_hand(layer, None), evaluating(layer):
        if isinstance(effect, LowRank) and not effect.gains:
            f = effect.factors()
            A, B = (wide(t) for t in f.unscaled())
            own = len(A) == groups * B.shape[1]  # each group has rows of A for itself
            return Change(
                A.unflatten(0, (groups, -1)) if own else A.expand(groups, *A.shape),
                (B if f.scale is None else B * f.scale).unflatten(0, (groups, -1)),
                f.shift(),
            )
        if isinstance(effect, Update):
            W, shift = delta_of(layer, effect), shift_of(effect)
        else:
            before, b = wide(layer.W0), layer.bias_now
            W, bias = fold_step(layer, m, effect, before, b)
            W, shift = W - before, None if bias is b or bias is None else bias if b is None else bias - b
    return Change(wide(W).flatten(1).unflatten(0, (groups, -1)), None, shift)


def wide(t: Tensor) -> Tensor:
    """Return the values, in float32 at least."""
    t = t.detach()
    return t if t.dtype in (torch.float32, torch.float64) else t.float()
