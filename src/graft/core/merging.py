# SPDX-License-Identifier: Apache-2.0
"""Merging: the base weight takes over the work of adapters, and gives it back. Written once for every method.

Weights fold in the order in which adapters act (`plan.ordered`). What is merged later goes on top if it acts later; if
it acts before something that is merged already, all are taken out and folded anew, so that merging a, then b, equals
both at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from graft.core.effect import LowRank, Replace
from graft.core.errors import warn
from graft.core.plan import Step, evaluating, fold_step, ordered, shift_of


def not_merged(layer: Any, names: Sequence[str] | None) -> list[str]:
    """Those of `names` (None: the active ones) that are not merged yet. Says what is merged already."""
    if isinstance(names, str):
        raise TypeError(f"adapter_names should be a list of strings, got {names!r}: write ['{names}'].")
    done = layer.state.merged
    names = layer.state.active if names is None else names
    left = [n for n in names if n not in done]
    if done:
        say_merged(done, names, left, replaces(layer, left))
    return left


def replaces(layer: Any, names: Sequence[str]) -> bool:
    """Whether one of these adapters stands in for the whole layer."""
    return any([layer.methods[n].effect.whole for n in names if n in layer.methods])


def say_merged(done: Sequence[str], names: Sequence[str], left: Sequence[str], replaces: bool) -> None:
    if done and left and replaces:
        warn(f"Unmerging {list(done)} first: only one can stand in for a layer.")
    elif done and left:
        warn(
            f"Already following adapters were merged {','.join(done)}. "
            f"You are now additionally merging {','.join(left)}."
        )
    elif done and names:
        warn("All adapters are already merged, nothing to do.")


def check_together(layer: Any, methods: Sequence[Any]) -> None:
    """Raise if these adapters cannot act on the layer at once."""
    if len(methods) < 2:
        return
    whole = [m for m in methods if m.effect.whole]
    if whole:
        names = [m.name for m in methods]
        raise ValueError(
            f"Trying to use more than one {type(whole[0]).__name__} adapter {names} at once on layer "
            f"'{layer.site.key}', but each replaces the whole layer: activate one."
            if len(whole) == len(methods)
            else f"Trying to use {names} at once on layer '{layer.site.key}', but '{whole[0].name}' replaces the whole "
            "layer: activate one."
        )
    for kind in dict.fromkeys(m.config for m in methods):
        same = [m for m in methods if m.config is kind]
        if len(same) > 1:
            type(same[0]).check_together(same)


def check(layer: Any, names: Sequence[str], safe: bool, undoable: bool) -> None:
    """Raise what merging would raise, writing nothing. `safe` computes the weights, to see that they are finite."""
    key = layer.site.key
    methods = [layer.methods[n] for n in names if n in layer.methods]
    if not methods:
        return
    if layer.state.disabled and undoable:
        raise ValueError(
            f"Cannot merge adapter(s) {list(names)} into layer '{key}' while adapters are disabled: it would act with "
            "them at once. Enable them first (or leave the disable_adapter() block); merge_and_unload() works as it is."
        )
    why = fixed(layer, methods)
    if why is not None:
        raise NotImplementedError(
            f"Cannot merge adapter(s) {list(names)} into layer '{key}': {why}. Keep them unmerged, or unload()."
        )
    if replaces(layer, names):  # one stands in for another
        check_together(layer, methods)
        with layer.store.at_hand(layer, None) if safe else nullcontext():
            if safe and not all(p.isfinite().all() for m in methods for p in m.effect.module().parameters()):  # type: ignore[attr-defined]
                raise ValueError(_broken(names, key))
        return
    check_together(layer, [layer.methods[n] for n in layer.state.merged] + methods)
    if safe:
        with layer.store.at_hand(layer, None):
            everything, start = in_order(layer, names)
            W, b = folded(layer, everything if start is None else start, from_w0=start is None)
        if not (W.isfinite().all() and (b is None or b.isfinite().all())):
            raise ValueError(_broken(names, key))


def fixed(layer: Any, methods: Sequence[Any]) -> str | None:
    """Why these adapters cannot be written into this layer, if so."""
    effects = [m.effect for m in methods]
    for effect in effects:
        if effect.fixed is not None:
            return effect.fixed  # type: ignore[no-any-return]
    if any([effect.whole for effect in effects]):
        return None
    base, store = layer.base_layer, layer.store
    why = store.fixed(base, layer.site.parameter)
    bias = None if why is not None else store.fixed(base, "bias")
    if bias is not None:
        with evaluating(layer):
            shifted = any([effect.additive and shift_of(effect) is not None for effect in effects])
        why = bias if shifted else None
    return why  # type: ignore[no-any-return]


def _broken(names: Sequence[str], key: str) -> str:
    return (
        f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken (layer '{key}'); the "
        "base weight was left as it is."
    )


def in_order(layer: Any, names: Sequence[str]) -> tuple[list[Step], list[Step] | None]:
    """The steps of all that will be merged; and of `names` alone, if they can go on top of what is merged."""
    done = layer.state.merged
    steps = ordered(layer, [layer.methods[n] for n in (*done, *names) if n in layer.methods])
    if not done:
        return steps, steps
    new = [step for step in steps if step[0].name not in done]
    on_top = steps[len(steps) - len(new) :] == new or all(effect.additive for _, effect in steps)
    return steps, new if on_top else None


def merge(layer: Any, names: list[str], undoable: bool) -> None:
    """Merge adapters that have been checked."""
    if replaces(layer, names):
        _swap(layer, names)
        return
    steps, new = in_order(layer, names)
    if new is None:
        names = [*layer.state.merged, *names]
        unmerge(layer)
        new = steps
    with layer.store.at_hand(layer, layer.base_layer), evaluating(layer):
        _write(layer, names, new, undoable)


@torch.no_grad()
def folded(layer: Any, steps: Sequence[Step], from_w0: bool = False) -> tuple[Tensor, Tensor | None]:
    """Weight (canonical) and bias with `steps` folded in: at least float32 inside, rounded once at the end."""
    b: Any = getattr(layer.base_layer, "bias", None)
    W = layer.weight_now
    if from_w0:
        W, b = unmerged(layer)
        W = layer.op.canon(W)
    dtype = W.dtype
    W = W.to(torch.promote_types(dtype, torch.float32))
    wide = None if b is None else b.to(torch.promote_types(b.dtype, torch.float32))
    bias = wide
    with evaluating(layer):
        for m, effect in steps:
            W, bias = fold_step(layer, m, effect, W, bias)
    return W.to(dtype), b if bias is wide or bias is None else bias.to(bias.dtype if b is None else b.dtype)


def in_place(layer: Any) -> Tensor | None:
    """The base weight as a matrix (out, fan_in) that low-rank updates can be added to in place, or None."""
    if not layer.store.live or layer.site.shared:
        return None
    W = layer.op.canon(layer.store.read(layer.base_layer, layer.site.parameter).data)
    plain = type(W) is Tensor and W.dtype in (torch.float32, torch.float64)  # no other, such as one shard of it
    return W if plain and W.dim() == 2 else None


def _low_rank(steps: Sequence[Step]) -> list[Any] | None:
    """The factors of steps that are nothing but products."""
    found = []
    for _, effect in steps:
        if not (isinstance(effect, LowRank) and effect.additive):
            return None
        found.append(effect.factors())
    return found


def _add_in_place(layer: Any, W: Tensor, names: list[str], factors: list[Any], undoable: bool) -> None:
    kept = []
    for f in factors:
        A, B = (t.detach() for t in f.matrices())
        W.addmm_(B.to(W.dtype), A.to(W.dtype))
        kept.append((A.clone(), B.clone()) if undoable else (A, B))
    if undoable:
        layer.state.undo.append(("subtract", kept, None))
    layer.state.merged += names


@torch.no_grad()
def _write(layer: Any, names: list[str], steps: Sequence[Step], undoable: bool) -> None:
    base, name, shared = layer.base_layer, layer.site.parameter, layer.site.shared
    factors, state = _low_rank(steps), layer.state
    matrix = None if factors is None else in_place(layer)
    if factors is not None and matrix is not None and all(f.shift() is None for f in factors):
        _add_in_place(layer, matrix, names, factors, undoable)
        return
    W, bias = folded(layer, steps)
    old: Any = getattr(base, "bias", None)
    shifted = bias is not None and bias is not old
    if undoable:
        old_bias = old.detach().clone() if shifted else None
        if factors is not None and layer.store.exact and not shared:
            # kept, so that what is subtracted is what was added, whatever happens to the adapter
            state.undo.append(
                ("subtract", [tuple(t.detach().clone() for t in f.matrices()) for f in factors], old_bias)
            )
        else:  # the first snapshot undoes all later merges too
            first = not any(kind == "restore" for kind, _, _ in state.undo)
            state.undo.append(("restore", layer.store.snapshot(base, name, shared) if first else None, old_bias))
    replaced = layer.store.write(base, name, layer.op.uncanon(W), shared)
    if replaced is not None:
        layer._modules["base_layer"] = replaced
    if shifted:
        layer.base_layer.bias.data.copy_(bias)
    state.merged += names


def _swap(layer: Any, names: list[str]) -> None:
    if layer.state.merged:
        unmerge(layer)
    _change_places(layer, names[0])
    layer.state.merged = names


def _change_places(layer: Any, adapter: str) -> None:
    """The base layer and the adapter's module stand where the other stood (PEFT's layout while merged)."""
    container = getattr(layer, layer.methods[adapter].layer_names[0])
    layer._modules["base_layer"], container[adapter] = container[adapter], layer.base_layer


@torch.no_grad()
def unmerge(layer: Any) -> None:
    """Undo all merges, the last one first."""
    state = layer.state
    if not state.undo and state.merged and isinstance(layer.methods[state.merged[0]].effect, Replace):
        _change_places(layer, state.merged[0])
    with layer.store.at_hand(layer, layer.base_layer) if state.undo else nullcontext():
        for kind, kept, bias in reversed(state.undo):
            if kind == "subtract":
                _subtract(layer, kept)
            elif kept is not None:
                layer.store.restore(layer.base_layer, layer.site.parameter, kept)
            if bias is not None:
                layer.base_layer.bias.data.copy_(bias)
    state.undo.clear()
    state.merged = []


@contextmanager
def lifted(layer: Any) -> Iterator[None]:
    """Take what is merged out within the block, and fold it in again on what the block leaves."""
    names = list(layer.state.merged)
    if not names or replaces(layer, names):
        yield
        return
    unmerge(layer)
    try:
        yield
    finally:
        merge(layer, names, undoable=True)


@torch.no_grad()
def unmerged(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Weight (as stored) and bias as they are without what is merged."""
    W = layer.store.read(layer.base_layer, layer.site.parameter)
    bias: Any = getattr(layer.base_layer, "bias", None)
    for kind, state, old in reversed(layer.state.undo):
        if kind == "subtract":
            W = layer.op.uncanon(_without(layer, layer.op.canon(W), state))
        elif state is not None:
            W = layer.store.kept(layer.base_layer, layer.site.parameter, state).to(W.device)  # the model may have moved
        bias = bias if old is None else old.to(bias.device)
    return W, bias


def tied_weight(layer: Any) -> nn.Parameter | None:
    """The weight that a merged layer has left to the modules it is tied to, and shares with them again afterwards."""
    return next((w for kind, w, _ in layer.state.undo if kind == "restore" and isinstance(w, nn.Parameter)), None)


def _without(layer: Any, W: Tensor, factors: list[tuple[Tensor, Tensor]]) -> Tensor:
    wide = W.to(torch.promote_types(W.dtype, torch.float32))
    for A, B in reversed(factors):
        wide = wide - layer.op.product(A.to(wide), B.to(wide), layer.site.shape)
    return wide.to(W.dtype)


def _subtract(layer: Any, factors: list[tuple[Tensor, Tensor]]) -> None:
    matrix = in_place(layer)
    if matrix is not None:
        for A, B in reversed(factors):
            matrix.addmm_(B.to(matrix), A.to(matrix), alpha=-1)
        return
    name = layer.site.parameter
    W = _without(layer, layer.op.canon(layer.store.read(layer.base_layer, name)), factors)
    layer.store.write(layer.base_layer, name, layer.op.uncanon(W), False)
