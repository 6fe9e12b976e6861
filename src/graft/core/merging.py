# SPDX-License-Identifier: Apache-2.0
"""Merging: the base weight takes over the work of adapters, and gives it back. Written once for every method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graft.core.errors import warn

if TYPE_CHECKING:
    from graft.core.layer import AdapterLayer
    from graft.core.method import Method


def not_merged(layer: AdapterLayer, names: Sequence[str] | None) -> list[str]:
    """Those of `names` (None: the active ones) that are not merged yet. Says what is merged already."""
    if isinstance(names, str):
        raise TypeError(f"adapter_names should be a list of strings, got {names!r}: write ['{names}'].")
    names = layer.active_adapters if names is None else names
    left = [n for n in names if n not in layer.merged_adapters]
    say_merged(layer.merged_adapters, names, left, layer.method.replaces)
    return left


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


def check(layer: AdapterLayer, names: Sequence[str], safe: bool) -> None:
    """Raise what merging would raise, writing nothing. `safe` computes the weights, to see that they are finite."""
    method, key = layer.method, layer.site.key
    methods = [layer.methods[n] for n in names if n in layer.methods]
    if not methods:
        return
    why = None
    if not method.mergeable:
        why = f"{method.__name__} has no merged form"
    elif not (method.replaces or (layer.store.reads and layer.store.writes)):
        why = f"{layer.store.name} weights cannot be rewritten"
    elif layer.site.on_meta:
        why = "its weight is on the meta device: not loaded, or offloaded after the adapter was added"
    if why is not None:
        raise NotImplementedError(
            f"Cannot merge adapter(s) {list(names)} into layer '{key}': {why}. Keep them unmerged, or unload()."
        )
    if method.replaces:  # one stands in for another
        method.check_together(methods)
        if safe and not all(p.isfinite().all() for m in methods for p in m.replacement().parameters()):
            raise ValueError(_broken(names, key))
        return
    method.check_together([layer.methods[n] for n in layer.merged_adapters] + methods)
    for m in methods:
        m.check_merge()
    if safe:
        W, b = folded(layer, methods)
        if not (W.isfinite().all() and (b is None or b.isfinite().all())):
            raise ValueError(_broken(names, key))


def _broken(names: Sequence[str], key: str) -> str:
    return (
        f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken (layer '{key}'); the "
        "base weight was left as it is."
    )


def merge(layer: AdapterLayer, names: list[str], undoable: bool) -> None:
    """Merge adapters that have been checked."""
    if layer.method.replaces:
        _swap(layer, names)
        return
    if not layer.method.additive and layer.order == "in" and layer.merged_adapters:
        names = [*layer.merged_adapters, *names]  # folds of inputs nest: new ones go inside those already there
        unmerge(layer)
    _write(layer, names, undoable)


@torch.no_grad()
def folded(layer: AdapterLayer, methods: list[Method]) -> tuple[Tensor, Tensor | None]:
    """Weight (canonical) and bias with `methods` folded in: at least float32 inside, rounded once at the end."""
    W = layer.op.canon(layer.store.read(layer.base_layer, layer.site.parameter))
    b: Any = getattr(layer.base_layer, "bias", None)
    dtype = W.dtype
    W = W.to(torch.promote_types(dtype, torch.float32))
    wide = None if b is None else b.to(torch.promote_types(b.dtype, torch.float32))
    bias = wide
    for m in methods[::-1] if layer.order == "in" else methods:
        W, bias = m.fold(W, bias)
    return W.to(dtype), b if bias is wide or bias is None else bias.to(b.dtype)


def in_place(layer: AdapterLayer) -> Tensor | None:
    """The base weight as a matrix (out, fan_in) that low-rank updates can be added to in place, or None."""
    if not layer.store.live or layer.site.shared:
        return None
    W = layer.op.canon(layer.store.read(layer.base_layer, layer.site.parameter).data)
    return W if W.dim() == 2 and W.dtype in (torch.float32, torch.float64) else None


def _add_in_place(layer: AdapterLayer, W: Tensor, names: list[str], undoable: bool) -> None:
    kept = []
    for m in (layer.methods[n] for n in names):
        A, B = (f.detach() for f in m.factors())
        W.addmm_(B.to(W.dtype), A.to(W.dtype))
        kept.append((A.clone(), B.clone()) if undoable else (A, B))
    if undoable:
        layer._undo.append(("subtract", kept, None))
    layer.merged_adapters += names


@torch.no_grad()
def _write(layer: AdapterLayer, names: list[str], undoable: bool) -> None:
    base, name, shared = layer.base_layer, layer.site.parameter, layer.site.shared
    methods = [layer.methods[n] for n in names]
    low_rank = all(m.low_rank and m.additive for m in methods)
    matrix = in_place(layer) if low_rank else None
    if matrix is not None and all(m.delta_bias() is None for m in methods):
        _add_in_place(layer, matrix, names, undoable)
        return
    W, bias = folded(layer, methods)
    old: Any = getattr(base, "bias", None)
    shifted = bias is not None and bias is not old
    if undoable:
        old_bias = old.detach().clone() if shifted else None
        if low_rank and layer.store.exact and not shared:
            # kept, so that what is subtracted is what was added, whatever happens to the adapter
            factors = [tuple(f.detach().clone() for f in m.factors()) for m in methods]
            layer._undo.append(("subtract", factors, old_bias))
        else:  # the first snapshot undoes all later merges too
            first = not any(kind == "restore" for kind, _, _ in layer._undo)
            layer._undo.append(("restore", layer.store.snapshot(base, name, shared) if first else None, old_bias))
    replaced = layer.store.write(base, name, layer.op.uncanon(W), shared)
    if replaced is not None:
        layer._modules["base_layer"] = replaced
    if shifted:
        layer.base_layer.bias.data.copy_(bias)
    layer.merged_adapters += names


def _swap(layer: AdapterLayer, names: list[str]) -> None:
    if layer.merged_adapters:
        unmerge(layer)
    _change_places(layer, names[0])
    layer.merged_adapters = names


def _change_places(layer: AdapterLayer, adapter: str) -> None:
    """The base layer and the adapter's module stand where the other stood (PEFT's layout while merged)."""
    container = getattr(layer, layer.containers[0])
    layer._modules["base_layer"], container[adapter] = container[adapter], layer.base_layer


@torch.no_grad()
def unmerge(layer: AdapterLayer) -> None:
    """Undo all merges, the last one first."""
    if layer.method.replaces:
        _change_places(layer, layer.merged_adapters[0])
    for kind, state, bias in reversed(layer._undo):
        if kind == "subtract":
            _subtract(layer, state)
        elif state is not None:
            layer.store.restore(layer.base_layer, layer.site.parameter, state)
        if bias is not None:
            layer.base_layer.bias.data.copy_(bias)
    layer._undo.clear()
    layer.merged_adapters = []


@torch.no_grad()
def unmerged(layer: AdapterLayer) -> tuple[Tensor, Tensor | None]:
    """Weight (as stored) and bias as they are without what is merged."""
    W = layer.store.read(layer.base_layer, layer.site.parameter)
    bias = getattr(layer.base_layer, "bias", None)
    for kind, state, old in reversed(layer._undo):
        if kind == "subtract":
            W = layer.op.uncanon(_without(layer, layer.op.canon(W), state))
        elif state is not None:
            W = state
        bias = bias if old is None else old
    return W, bias


def _without(layer: AdapterLayer, W: Tensor, factors: list[tuple[Tensor, Tensor]]) -> Tensor:
    wide = W.to(torch.promote_types(W.dtype, torch.float32))
    for A, B in reversed(factors):
        wide = wide - (B.to(wide.dtype) @ A.to(wide.dtype)).view(layer.site.shape)
    return wide.to(W.dtype)


def _subtract(layer: AdapterLayer, factors: list[tuple[Tensor, Tensor]]) -> None:
    matrix = in_place(layer)
    if matrix is not None:
        for A, B in reversed(factors):
            matrix.addmm_(B.to(matrix.dtype), A.to(matrix.dtype), alpha=-1)
        return
    name = layer.site.parameter
    W = _without(layer, layer.op.canon(layer.store.read(layer.base_layer, name)), factors)
    layer.store.write(layer.base_layer, name, layer.op.uncanon(W), False)
