# SPDX-License-Identifier: Apache-2.0
# Supported inside: rooms may import this module.
"""Merging: the base weight takes the updates of adapters in, and gives them back.

One implementation for all methods.

Weights fold in the adapters' order of action (`order_steps`). An adapter merged later is folded on top if it acts
later. If it acts before a merged one, `merge_adapters` takes all out and folds anew. So merging a, then b, equals
merging both at once. Where writing rounds, the layer records how much of the update the rounding left
(`core/finite.py`).

Unmerging restores a weight in half precision bit for bit, since the first merge keeps a copy. In float32 and float64 a
merge of products alone keeps the factors and subtracts the products again. That costs no copy, and rounds.

A merge first checks every layer and that the adapters' tensors are finite. Then it folds in order, with the layer in
eval mode, so that nothing random is merged, and writes. A weight tied to another module is not overwritten in place:
the layer gets a new one. Of a packed stack, one matrix at a time is dense.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import MethodType
from typing import TypeVar

import torch
from torch import Tensor, nn

from graft.core.carrier import check_name_list
from graft.core.containers import iter_slots
from graft.core.each import MatrixUpdate, pieces_of, read_base_stack
from graft.core.effect import HALF, Effect, Replace, Rewrite, Update
from graft.core.errors import PeftWarning, UnsupportedLayerError, describe_function, warn
from graft.core.finite import max_magnitudes, measure_survival
from graft.core.folding import EvaluationMode, fold_effect, weigh_steps
from graft.core.method import Layer, Method
from graft.core.ops import Op
from graft.core.plan import Step, order_steps

L = TypeVar("L", bound=Layer)
FULL = (torch.float32, torch.float64)  # unmerging subtracts, which restores weights except for the last digits
MIN_SHARE_KEPT = 0.9  # share of an update; a merge that keeps less warns


def select_unmerged(module: Layer, adapter_names: Sequence[str] | None = None) -> list[str]:
    """Return those of `adapter_names` that are not merged yet; None means the active adapters.

    Names that the layer lacks are not left out.

    If any adapter is merged, `warn_merged` warns: that all names are merged already, that further ones are merged on
    top, or that a replacement forces an unmerge. Raises TypeError or ValueError for bad names (`check_name_list`).
    """
    done = module.state.merged
    names = module.state.active if adapter_names is None else check_name_list(adapter_names, "adapter_names")
    left = [n for n in names if n not in done]
    if done:
        warn_merged(done, names, left, includes_replacement(module, left))
    return left


def includes_replacement(layer: Layer, names: Sequence[str]) -> bool:
    """Return True if one of these adapters replaces the whole layer by a module.

    Names that the layer lacks are ignored.
    """
    return any([layer.methods[n].effect.whole for n in names if n in layer.methods])


def warn_merged(done: Sequence[str], names: Sequence[str], left: Sequence[str], replaces: bool) -> None:
    """Warn about a merge while the adapters `done` are merged; do nothing if none is merged.

    Warns that they are unmerged first, if one of `left` replaces the layer. Else that `left` is merged additionally.
    Else, if `left` is empty and `names` is not, that there is nothing to do.

    Args:
        names: the adapters to merge.
        left: those of them that are not merged.
        replaces: one of `left` replaces the layer.
    """
    if done and left and replaces:
        warn(f"Unmerging {list(done)} first: only one can replace a layer.")
    elif done and left:
        warn(
            f"Already following adapters were merged {','.join(done)}. "
            f"You are now additionally merging {','.join(left)}."
        )
    elif done and names:
        warn("All adapters are already merged, nothing to do.")


def check_together(layer: Layer, methods: Sequence[Method]) -> None:
    """Raise if these adapters cannot act on the layer at once. Fewer than two always can.

    Raises ValueError if one of them replaces the whole layer. Else raises the errors of `check_together` of each method
    (by config class) that has more than one adapter among them.
    """
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


def check_merge(
    layer: Layer, names: Sequence[str], safe: bool, undoable: bool, checked_kinds: CheckedKinds | None = None
) -> None:
    """Raise the errors that merging these adapters would raise, without writing.

    Adapters that the layer does not carry are ignored; without any other, all passes. Replacements of the layer are
    checked with each other alone, not with merged adapters, and not for the bias.

    Args:
        safe: also compute the merged weights, together with merged adapters, or read the parameters of a replacement,
            and raise unless they are finite. An offloaded or sharded weight is brought in for that.
        undoable: the merge is to be undone later, so that adapters must not be disabled.
        checked_kinds: kinds of layers that `shifts_bias` has checked; the call adds to it.

    Raises:
        NotImplementedError: adapters are active in parallel, have no merged form (`why_unmergeable`), or shift a bias
            that the layer lacks.
        ValueError: adapters are disabled, cannot act together with each other or with merged ones, or a merged value is
            not finite.
    """
    key = layer.site.key
    methods = [layer.methods[n] for n in names if n in layer.methods]
    if not methods:
        return
    if layer.state.apart:
        raise NotImplementedError(
            f"Cannot merge adapter(s) {list(names)} into layer '{key}': they are active in parallel, each for copies "
            "of the batch. Activate one of them, a Stack or an Average first: set_adapter()."
        )
    if undoable and (layer.state.disabled or layer.call.blocks):
        raise ValueError(
            f"Cannot merge adapter(s) {list(names)} into layer '{key}' while adapters are disabled: it would act with "
            "them at once. Enable them first (or leave the disable_adapter() block, which may be another thread's); "
            "merge_and_unload() works as it is."
        )
    why = why_unmergeable(layer, methods)
    if why is not None:
        raise NotImplementedError(
            f"Cannot merge adapter(s) {list(names)} into layer '{key}': {why}. Keep them unmerged, or "
            + ("merge_and_unload(dequantize=True)." if may_dequantize(layer, methods) else "unload().")
        )
    if includes_replacement(layer, names):  # one replaces another
        check_together(layer, methods)
        modules = [m.effect.module() for m in methods if isinstance(m.effect, Replace)]
        with layer.base_weight.bring_in(layer) if safe else nullcontext():
            if safe and not all(p.isfinite().all() for module in modules for p in module.parameters()):
                raise ValueError(_not_finite_text(layer, names))
        return
    check_together(layer, [layer.methods[n] for n in layer.state.merged] + methods)
    checked_kinds = set() if checked_kinds is None else checked_kinds
    if getattr(layer.base_layer, "bias", None) is None and any([shifts_bias(layer, m, checked_kinds) for m in methods]):
        raise NotImplementedError(_no_bias_text(layer, names))
    if safe:
        with layer.base_weight.bring_in(layer):
            everything, start = order_merge_steps(layer, names)
            finite = stays_finite(layer, everything if start is None else start, from_w0=start is None)
        if not finite:
            raise ValueError(_not_finite_text(layer, names))


def why_unmergeable(layer: Layer, methods: Sequence[Method]) -> str | None:
    """Return why merging cannot write these adapters into this layer; None if it can. The first reason counts:

    - An effect has no merged form. If none has this reason and one has a module for the whole layer, all pass.
    - A replaced `get_delta_weight` cannot give the updates.
    - The layer type cannot fold, unless all effects run a module on the values.
    - The weight cannot be written.
    - The bias cannot be written and an additive effect shifts it. The layer is in evaluation mode for this question.
    """
    effects = [m.effect for m in methods]
    for effect in effects:
        if effect.why_unmergeable is not None:
            return effect.why_unmergeable
    if any([effect.whole for effect in effects]):
        return None
    if (why := why_no_delta_weight(layer, methods)) is not None:
        return why
    base = layer.base_weight
    if (
        not all([effect.runs_module_on_values for effect in effects])
        and (why := layer.op.why_unfoldable(layer.get_base_layer())) is not None
    ):
        return why
    why = base.why_unwritable()
    has_bias = why is None and getattr(base.module, "bias", None) is not None
    bias = replace(base, name="bias").why_unwritable() if has_bias else None
    if bias is not None:
        with EvaluationMode(layer):
            shifted = any([effect.additive and effect.shift() is not None for effect in effects])
        why = bias if shifted else None
    return why


CheckedKinds = set[tuple[type, int, type]]  # method, id of the config, kind of layer


def shifts_bias(layer: Layer, m: Method, checked_kinds: CheckedKinds) -> bool:
    """Return True if merging an adapter makes a bias where the layer has none.

    Method, config and layer type decide that. So a kind that is in `checked_kinds` gives False, and others are added to
    it. An effect on single matrices of a stack gives False, without being added. Else the weight is brought in, with
    the layer in evaluation mode: an effect with a `shift` gives True. A Rewrite has to be folded for the answer, which
    takes as long as the merge.
    """
    kind = (type(m), id(m.cfg), type(layer.op))
    if kind in checked_kinds or m.effect.pieces is not None:
        return False
    checked_kinds.add(kind)
    with layer.base_weight.bring_in(layer), EvaluationMode(layer), torch.no_grad():
        if not isinstance(m.effect, Rewrite):
            return m.effect.shift() is not None
        W = layer.weight_now
        return m.effect.merged(W.to(torch.promote_types(W.dtype, torch.float32)), None)[1] is not None


def may_dequantize(layer: Layer, methods: Sequence[Method]) -> bool:
    """Return True if the merge would work after dequantizing: only the packed weight, which can be read, prevents it.

    False if the store is exact, if the op cannot fold its module or has a packed shape, or if a method's effect is
    unmergeable.
    """
    packed = not layer.store.exact and layer.base_weight.why_unreadable() is None
    packed = packed and layer.op.why_unfoldable(layer.get_base_layer()) is None and layer.op.packed_shape is None
    return packed and all(m.effect.why_unmergeable is None for m in methods)


def _no_bias_text(layer: Layer, names: Sequence[str]) -> str:
    """Return the error text for adapters that shift the bias of a layer without one."""
    return (
        f"Cannot merge adapter(s) {list(names)} into layer '{layer.site.key}': they shift the bias, and it has none. "
        "Keep them unmerged, or unload()."
    )


def _not_finite_text(layer: Layer, names: Sequence[str]) -> str:
    """Return the error text for merged values that are not finite.

    It names the adapters' tensors on this layer that are not finite themselves, if there are any.
    """
    wrong = [
        f"'{slot.container}.{name}'"
        for name in names if name in layer.methods
        for slot, t in layer.tensors(name, transient=True) if not math.isfinite(*max_magnitudes([t]))
    ]  # fmt: skip
    which = f": {', '.join(wrong)} holds values that are not finite" if wrong else ""
    return (
        f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken (layer "
        f"'{layer.site.key}'{which}); the base weight was left as it is."
    )


def check_adapters_finite(chosen: Mapping[L, Sequence[str]]) -> None:
    """Raise ValueError if adapters chosen for layers would write values that are not finite, which no unmerging could
    undo.

    Reads the largest value of all the adapters' tensors in one go, shared ones included. Only if one is not finite,
    calls `check_merge` with the merged values of the layers that use it: a method may turn it into a finite update, as
    VB-LoRA does with its logits. Names that a layer lacks are ignored. The other errors of `check_merge` may come, too.
    """
    tensors: dict[int, tuple[Tensor, list[L]]] = {}  # id of a tensor → the tensor and the layers that use it
    for layer, names in chosen.items():
        for name in names:
            if name in layer.methods:
                shared = (slot for key in layer.attached for slot in iter_slots(key, getattr(layer, key), name))
                for slot in (*layer.slots(name), *shared):
                    tensors.setdefault(id(slot.tensor), (slot.tensor, []))[1].append(layer)
    sizes = max_magnitudes([tensor for tensor, _ in tensors.values()])
    broken = [layer for (_, users), x in zip(tensors.values(), sizes) if not math.isfinite(x) for layer in users]
    for layer in dict.fromkeys(broken):
        check_merge(layer, chosen[layer], safe=True, undoable=False)


def find_patched_method(layer: Layer, name: str) -> Callable[..., object] | None:
    """Return the function that replaces a method of a layer, bound to the layer or set on it; None if the method is
    graft's own.

    It may be set on the layer itself, on a subclass, or on PEFT's class of this kind of layer.
    """
    original, current = getattr(type(layer), name), getattr(layer, name)
    if getattr(current, "__func__", None) is not original:
        return current  # type: ignore[no-any-return]
    find = getattr(original, "find", None)
    replacement = None if find is None else find(layer)
    return None if replacement is None else MethodType(replacement, layer)


DELTA = "get_delta_weight"


def use_patched_delta_weight(layer: Layer, steps: Sequence[Step]) -> list[Step]:
    """Return the steps, as a new list.

    If a client replaced the layer's `get_delta_weight`, each becomes an Update with the ΔW that the replacement
    returns.
    """
    function = find_patched_method(layer, DELTA)
    return (
        [*steps] if function is None else [(m, _make_patched_update(layer, m, effect, function)) for m, effect in steps]
    )


def _make_patched_update(layer: Layer, m: Method, effect: Effect, function: Callable[..., object]) -> Update:
    """Return an Update with the ΔW that `function` returns for the adapter, and the bias shift of `effect`.

    `function` is called when the ΔW is needed; the shift is computed now, and may be None.
    """

    def delta() -> Tensor:
        """Return function(adapter) in canonical orientation.

        The function is to return it in the weight's orientation.

        Raises UnsupportedLayerError, with both shapes, unless it is a tensor of the weight's shape.
        """
        update, shape = function(m.name), layer.base_weight.read().shape
        if not isinstance(update, Tensor) or update.shape != shape:
            what = tuple(update.shape) if isinstance(update, Tensor) else f"a {type(update).__name__}"
            raise UnsupportedLayerError(
                f"get_delta_weight of layer '{layer.site.key}', replaced by {describe_function(function)}, is to "
                f"return the update of adapter '{m.name}' in the weight's shape, {tuple(shape)}: it returned {what}."
            )
        return layer.op.canon(update)

    shift = effect.shift()
    return Update(delta, bias=None if shift is None else lambda: shift)


def why_no_delta_weight(layer: Layer, methods: Sequence[Method]) -> str | None:
    """Return why a replaced `get_delta_weight` cannot give the adapters' updates; None if it can, or if it is not
    replaced.

    It cannot for an effect that is not added to the weight or has no weight update (`weightless`), nor for a packed
    stack.
    """
    function = find_patched_method(layer, DELTA)
    if function is None:
        return None
    more = [m for m in methods if not m.effect.additive or m.effect.weightless]
    if more:
        why = f"adapter '{more[0].name}' ({type(more[0]).__name__}) does more than add that to the weight"
    elif layer.op.packed_shape is not None:
        why = "into a packed stack graft merges products alone"
    else:
        return None
    return f"get_delta_weight was replaced by {describe_function(function)}, and {why}"


def order_merge_steps(layer: Layer, names: Sequence[str]) -> tuple[list[Step], list[Step] | None]:
    """Return the steps of all merged adapters and `names` together; and those of `names` alone, if they can go on top.

    The second is None if they cannot: one acts before a merged adapter and not all add, or the store rounds. Without
    merged adapters both are the same list. Active adapters keep the order of their activation, whichever is merged
    first; inactive ones come last. Names that the layer lacks are ignored. A composition with weights is averaged. A
    replaced `get_delta_weight` gives the updates.
    """
    done, active = layer.state.merged, layer.state.active
    together = sorted([*done, *names], key=lambda n: active.index(n) if n in active else len(active))
    methods = [layer.methods[n] for n in together if n in layer.methods]
    steps = use_patched_delta_weight(layer, order_steps(layer, methods))
    if layer.state.weights is not None:
        steps = weigh_steps(layer, steps, dict(zip(active, layer.state.weights)))
    if not done:
        return steps, steps
    new = [step for step in steps if step[0].name not in done]
    on_top = steps[len(steps) - len(new) :] == new or all(effect.additive for _, effect in steps)
    return steps, new if on_top and layer.store.exact else None


def merge_adapters(layer: Layer, names: list[str], undoable: bool) -> None:
    """Merge adapters that passed `check_merge`, and add them to the merged ones. The caller refreshes the plan.

    If one of them is a replacement, all others are unmerged, and the first name's module is exchanged with the base
    layer. `names` becomes the list of merged adapters. Else, if new steps cannot go on top of merged ones, all are
    taken out and merged together. On an error an undoable merge leaves the layer as it was: all is taken out, the
    former adapters are merged again, and the plan is refreshed. Any other merge may leave it changed. The error
    continues.
    """
    if includes_replacement(layer, names):
        if layer.state.merged:
            unmerge(layer)
        _swap_modules(layer, names[0])
        layer.state.merged = names
        return
    (steps, new), done = order_merge_steps(layer, names), list(layer.state.merged)
    try:
        if new is None:
            unmerge(layer)
            _write_steps(layer, [*done, *names], steps, undoable)
        else:
            _write_steps(layer, names, new, undoable)
    except BaseException:
        if undoable:
            try:
                unmerge(layer)
                if done:
                    _write_steps(layer, done, order_merge_steps(layer, done)[0], undoable)
            finally:
                layer.refresh_plan()
        raise


def _write_steps(layer: Layer, names: list[str], steps: Sequence[Step], undoable: bool) -> None:
    """Fold steps into the base weight, then add `names` to the merged adapters.

    The weight is brought in, and the layer is in evaluation mode meanwhile.
    """
    with layer.base_weight.bring_in(layer, writes=True), EvaluationMode(layer):
        _write_merge(layer, names, steps, undoable)
    layer.state.merged += names


@torch.no_grad()
def stays_finite(layer: Layer, steps: Sequence[Step], from_w0: bool) -> bool:
    """Return True if weight and bias would be finite after folding `steps` in. Nothing is written.

    The layer is in evaluation mode meanwhile. A packed stack, if all steps can change single matrices, is tried matrix
    by matrix, without a bias. Any other weight is merged as a whole, in new memory.

    from_w0: start from the weight without adapters, and not from the present one; of a packed stack, from its base
    stack.
    """
    with EvaluationMode(layer):
        fold = _make_matrix_fold(layer, steps)
        if fold is not None:
            return bool((read_base_stack(layer) if from_w0 else layer.base_weight.snapshot()).folds_finite(fold))
    W, b = compute_merged(layer, steps, from_w0)
    return bool(W.isfinite().all() and (b is None or b.isfinite().all()))


@torch.no_grad()
def compute_merged(layer: Layer, steps: Sequence[Step], from_w0: bool = False) -> tuple[Tensor, Tensor | None]:
    """Return weight (canonical) and bias with `steps` folded in, in the weight's dtype, without gradients.

    Rounds once, at the end. A bias keeps its dtype.

    from_w0: start from the weight without adapters, and not from the present one.
    """
    if from_w0:
        W, b = layer.op.canon(compute_unmerged_weight(layer)), find_unmerged_bias(layer)
    else:
        W, b = layer.weight_now, layer.bias_now
    wide, b = _fold_steps(layer, steps, W, b)
    return wide.to(W.dtype), b


def _fold_steps(layer: Layer, steps: Sequence[Step], W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return W with `steps` folded in, in at least float32, and the bias. The layer is in evaluation mode meanwhile.

    The bias is folded in at least float32 and cast back to its dtype; b itself is returned if no step changes it. If b
    is None and a step shifts it, the new bias keeps its dtype.
    """
    W = W.to(torch.promote_types(W.dtype, torch.float32))
    wide = None if b is None else b.to(torch.promote_types(b.dtype, torch.float32))
    bias = wide
    with EvaluationMode(layer):
        for m, effect in steps:
            W, bias = fold_effect(layer, m, effect, W, bias)
    return W, b if bias is wide or bias is None else bias.to(bias.dtype if b is None else b.dtype)


def find_in_place_weight(layer: Layer) -> Tensor | None:
    """Return the base weight as a matrix (out, fan_in), or a stack, for merges that add products in place.

    Returns None if the store does not hold the tensor itself, or if the weight is tied. Also for a subclass of Tensor,
    other dtypes than float64, float32, float16 and bfloat16, vectors, and a convolution's weight that is not
    contiguous.
    """
    if not layer.store.live or layer.site.shared:
        return None
    W = layer.weight_now.data
    if type(W) is not Tensor or W.dtype not in (*FULL, *HALF) or W.dim() < 2:  # another type may be a shard
        return None
    return W if W.dim() == 2 or layer.op.opaque else W.flatten(1) if W.is_contiguous() else None


def _collect_products(steps: Sequence[Step]) -> list[tuple[Tensor, Tensor]] | None:
    """Return detached A and B of each step, with scale and vectors in them, if each step is nothing but a product
    without a bias; else None.
    """
    products = []
    for _, effect in steps:
        if effect.product is None:
            return None
        f = effect.product()
        if f.shift() is not None:
            return None
        A, B = f.matrices()
        products.append((A.detach(), B.detach()))
    return products


def _make_matrix_fold(layer: Layer, steps: Sequence[Step]) -> Callable[[int, Tensor], Tensor] | None:
    """Return a function (expert, W) that folds steps into one matrix of a packed stack, with detached tensors of the
    adapters.

    Returns None if the weight is no packed stack, or if a step cannot change single matrices.
    """
    pieces = [pieces_of(layer, effect) for _, effect in steps] if layer.op.packed_shape is not None else [None]
    if any(p is None for p in pieces):
        return None
    making = MatrixUpdate(pieces, False)  # type: ignore[arg-type]
    tensors = [t.detach() for t in making.tensors]
    return lambda expert, W: making.apply_pieces(expert, [t[expert] for t in tensors], W, W)


def _add_products(op: Op, W: Tensor, products: Sequence[tuple[Tensor, Tensor]], sign: int = 1) -> Tensor:
    """Add products to W in place, or subtract them with sign = -1, and return W.

    If W has half precision, it stays, and a new float32 copy with the sum is returned. On an error products that were
    added are subtracted again, so that W is as before except for the last digits, and the error continues. Of a stack,
    each matrix gets its own product.
    """
    wide = W.to(torch.promote_types(W.dtype, torch.float32))
    done: list[tuple[Tensor, Tensor, Tensor]] = []
    try:
        for both in products:
            for matrix, A, B in op.pair_matrices(wide, *both):
                matrix.addmm_(B.to(wide), A.to(wide), alpha=sign)
                done.append((matrix, A, B))
    except BaseException:
        for matrix, A, B in reversed(done):
            matrix.addmm_(B.to(wide), A.to(wide), alpha=-sign)
        raise
    return wide


def _take_snapshot(layer: Layer) -> object:
    """Return the store's snapshot of the base weight: a copy, or the parameter itself if it is tied.

    Returns None if `state.undo` has a "restore" entry already, since that also undoes this merge.
    """
    if any(kind == "restore" for kind, _, _ in layer.state.undo):
        return None
    return layer.base_weight.snapshot()


@torch.no_grad()
def _write_merge(layer: Layer, names: list[str], steps: Sequence[Step], undoable: bool) -> None:
    """Write the steps into the base weight and bias. If `undoable`, append to `state.undo` how to undo that.

    - All steps are products and the weight can be changed in place: they are added. Float32 and float64 weights are
      undone by subtracting copies of the factors, others by a snapshot.
    - The steps can fold matrix by matrix (`_make_matrix_fold`): the stack is made anew, and restored into the layer.
    - No step changes the weight: only the bias is written, if it shifts.
    - Else the folded weight is written, in its dtype, and a shifted bias.

    Appends the share of the update that survived to `state.survived` where writing rounds.

    Raises:
        NotImplementedError: the steps shift a bias that the layer lacks. Nothing is written then.
    """
    state = layer.state
    products = _collect_products(steps)
    W = None if products is None else find_in_place_weight(layer)
    if products is not None and W is not None:
        if undoable and W.dtype in FULL:
            # copies, so that unmerging subtracts the same products after the adapter changed
            products = [(A.clone(), B.clone()) for A, B in products]
            _add_products(layer.op, W, products)
            state.undo.append(("subtract", products, None))
            return
        if undoable:  # half precision rounds, so that subtracting would not restore the weight
            state.undo.append(("restore", _take_snapshot(layer), None))
        wide = _add_products(layer.op, W, products)
        if wide is not W:
            state.survived.append(measure_survival(W, wide, W))
        return
    fold = _make_matrix_fold(layer, steps)
    if fold is not None:
        new_stack, survived = layer.base_weight.snapshot().fold(fold)
        if undoable:
            state.undo.append(("restore", _take_snapshot(layer), None))
        layer.base_weight.restore(new_stack)
        state.survived.append(survived)
        return
    before = layer.weight_now
    old = layer.bias_now
    wide, bias = _fold_steps(layer, steps, before, old)
    shifted = None if bias is old else bias
    if shifted is not None and old is None:
        raise NotImplementedError(_no_bias_text(layer, names))
    keeps_weight = all([effect.keeps_weight for _, effect in steps])
    if undoable:
        old_bias = None if shifted is None or old is None else old.detach().clone()
        state.undo.append(("bias", None, old_bias) if keeps_weight else ("restore", _take_snapshot(layer), old_bias))
    if not keeps_weight:
        rounded = wide.to(before.dtype)
        if layer.store.exact and rounded is not wide:
            # before writing, which may change the tensor that was read
            state.survived.append(measure_survival(before, wide))
        layer.base_weight.write(rounded)
        if not layer.store.exact:
            state.survived.append(measure_survival(before, wide, layer.weight_now))
    if shifted is not None:
        layer.write_bias(shifted)


def _swap_modules(layer: Layer, adapter: str) -> None:
    """Exchange the base layer and the adapter's module, which is PEFT's layout while merged.

    If the effect casts the module to the layer's dtypes, the base layer becomes a cast copy, and `state.uncast` keeps
    the module until the exchange back.
    """
    m, state, base = layer.methods[adapter], layer.state, layer.base_layer
    container = getattr(layer, m.layer_names[0])
    module = container[adapter]
    if state.merged:
        base, state.uncast = state.uncast or base, None
    elif (cast := m.effect.module()) is not module:  # type: ignore[attr-defined]
        state.uncast, module, values = module, copy.deepcopy(module), dict(cast.named_parameters())
        for name, p in module.named_parameters():
            p.data = values[name].data
    layer._modules["base_layer"], container[adapter] = module, base


@torch.no_grad()
def unmerge(layer: Layer) -> None:
    """Undo all merges, the last one first, and clear `undo`, `survived` and `merged` of the layer's state.

    No weight is written if none is merged.

    A "subtract" entry of `state.undo` has its products subtracted. Any other has its snapshot restored, if it has one.
    Then its bias is written, if it has one. Without any entry, a merged replacement is exchanged with the base layer
    again. An offloaded or sharded weight is brought in for the write. An adapter that was merged without `undoable`
    stays in the weight, but no longer counts as merged. The caller refreshes the plan.
    """
    state = layer.state
    if not state.undo and state.merged and isinstance(layer.methods[state.merged[0]].effect, Replace):
        _swap_modules(layer, state.merged[0])
    with layer.base_weight.bring_in(layer, writes=True) if state.undo else nullcontext():
        for kind, previous, bias in reversed(state.undo):
            if kind == "subtract":
                _subtract_products(layer, previous)
            elif previous is not None:
                layer.base_weight.restore(previous)
            if bias is not None:
                layer.write_bias(bias)
    state.undo.clear()
    state.survived.clear()
    state.merged = []


def measure_shares_kept(layers: Sequence[Layer]) -> list[float]:
    """Return for each layer the share of the merged update that its weight holds.

    The share is the sum of the first numbers in `state.survived` over the sum of the second. It is 1.0 where no
    rounding was recorded, or where the update is zero.

    The host waits once per device. See `AdapterLayer.share_kept`.
    """
    shares = [1.0] * len(layers)
    sums: dict[torch.device, dict[int, Tensor]] = {}  # device → index of the layer → (product, norm)
    for i, layer in enumerate(layers):
        if layer.state.survived:
            both = torch.stack(layer.state.survived).sum(0)
            sums.setdefault(both.device, {})[i] = both
    for by_layer in sums.values():
        for i, (dot, asked) in zip(by_layer, torch.stack(list(by_layer.values())).tolist()):
            shares[i] = dot / asked if asked > 0 else 1.0
    return shares


def warn_lost(layers: Iterable[Layer]) -> dict[str, float]:
    """Return the share of the merged update that each merged layer holds, by the layer's path; unmerged layers are left
    out.

    Warns once (PeftWarning), with the worst layer and a remedy, if a layer holds less than 90 %. The remedy depends on
    the storage of these layers: a packed stack, another quantized weight, or a dense one.
    """
    merged = [layer for layer in layers if layer.state.merged]
    shares = dict(zip([layer.site.key for layer in merged], measure_shares_kept(merged)))
    lost = [layer for layer in merged if shares[layer.site.key] < MIN_SHARE_KEPT]
    if lost:
        worst = min((layer.site.key for layer in lost), key=shares.__getitem__)
        packed = any(not layer.store.exact for layer in lost)
        warn(
            f"Merging has lost a part of the update to rounding on {len(lost)} of {len(merged)} layers, most on "
            f"'{worst}', where {max(shares[worst], 0):.1%} of it survived. Keep the adapter unmerged, or "
            + (
                "merge it into the base loaded dequantized (in transformers: dequantize=True in its "
                "quantization_config)"
                if any(layer.op.packed_shape is not None for layer in lost)
                else "merge_and_unload(dequantize=True)"
                if packed
                else "merge it into the base in float32 (model.float(), or load it with dtype=torch.float32)"
            )
            + "; graft.merge_report(model) has the share of each layer.",
            PeftWarning,
        )
    return shares


@contextmanager
def lift_merged(layer: Layer) -> Iterator[None]:
    """Take merged adapters out within the block, and merge them again, undoably, into the weight that the block leaves.

    They are merged again after an error as well. The block just runs if none is merged, or if the merged one replaces
    the layer. Else waits until no call of the model runs, and keeps calls of other threads waiting.
    """
    names = list(layer.state.merged)
    if not names or includes_replacement(layer, names):
        yield
        return
    with layer.call.gate.change(f"taking merged adapters {names} out for a while"):
        unmerge(layer)
        try:
            yield
        finally:
            merge_adapters(layer, names, undoable=True)


@torch.no_grad()
def compute_unmerged_weight(layer: Layer) -> Tensor:
    """Return the weight in the module's orientation without merged adapters, without gradients.

    Reads and computes; changes nothing.

    Goes through `state.undo` from its end. A "subtract" entry subtracts its products. Any other entry with a snapshot
    replaces the weight by the snapshot's values, on the weight's device. One without is passed over. An empty list
    leaves the present weight.
    """
    W = layer.base_weight.read()
    for kind, state, _ in reversed(layer.state.undo):
        if kind == "subtract":
            W = layer.op.uncanon(_compute_without(layer, layer.op.canon(W), state))
        elif state is not None:
            W = layer.base_weight.snapshot_values(state).to(W.device)  # the model may have moved
    return W


def find_unmerged_bias(layer: Layer) -> Tensor | None:
    """Return the bias without merged adapters: the copy in the first entry of `state.undo` with one, on the bias's
    present device; else the present bias. While the present bias is on the meta device, the copy stays on its device.
    """
    first: Tensor | None = next((old for _, _, old in layer.state.undo if old is not None), None)
    if first is None:
        return layer.bias_now
    bias = layer.base_layer.bias
    return first if bias.is_meta else first.to(bias.device)


def find_tied_weight(layer: Layer) -> nn.Parameter | None:
    """Return the parameter that a merged layer left to the modules tied to it: the first "restore" entry in
    `state.undo` with a parameter as snapshot. None if there is none.

    Unmerging makes the layer share it again.
    """
    return next((w for kind, w, _ in layer.state.undo if kind == "restore" and isinstance(w, nn.Parameter)), None)


def _compute_without(layer: Layer, W: Tensor, factors: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return W minus the products of `factors`, the last one first, in the dtype of W. Computes in at least float32."""
    wide = W.to(torch.promote_types(W.dtype, torch.float32))
    for A, B in reversed(factors):
        wide = wide - layer.op.product(A.to(wide), B.to(wide), layer.site.shape)
    return wide.to(W.dtype)


def _subtract_products(layer: Layer, factors: list[tuple[Tensor, Tensor]]) -> None:
    """Subtract products from the base weight, the last one first: in place where possible, else by reading and writing
    it by the store. A weight in half precision is subtracted from in float32 and rounded once.
    """
    matrix = find_in_place_weight(layer)
    if matrix is not None:
        wide = _add_products(layer.op, matrix, factors[::-1], -1)
        if wide is not matrix:
            matrix.copy_(wide)
        return
    weight = replace(layer.base_weight, shared=False)  # the model may have been sharded since the merge
    weight.write(_compute_without(layer, weight.canon(), factors))
