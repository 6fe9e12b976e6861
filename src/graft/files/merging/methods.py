# SPDX-License-Identifier: Apache-2.0
"""Merging of any method into a checkpoint: on a model with weights that take no memory; each weight is loaded
in turn.
"""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from graft import AdapterLayer, BaseModelMismatchError, LossError, Method, PeftModel
from graft.files.base import BaseDescription
from graft.files.formats import peft
from graft.files.load import find_adapter_layers
from graft.files.merging.folds import MergeJob, Read, TensorChange, replace_whole
from graft.files.merging.ties import head_class
from graft.files.merging.weights import to_file
from graft.files.neutral import LowRank
from graft.files.skeleton import build_meta_model, fill_with_zeros, make_expanded_zero

NAME = "default"


def list_method_changes(job: MergeJob, base: BaseDescription) -> list[TensorChange]:
    """Return the changes of an adapter's parts that are not low rank to a checkpoint; parts that are low rank are
    skipped.

    Loads the adapter onto the base's model with zeros as weights. Changes of a module that the adapter replaces whole
    are marked `alone`: no other adapter may change it.

    Raises:
        LossError: the adapter is a prompt, or FROD without its basis; these two are checked before the model is loaded.
            Or, once no layer is missing, a layer's effect depends on the input or is one on a block.
        BaseModelMismatchError: transformers does not know the base, or it has no place for a part.
    """
    adapter = job.adapter
    if adapter.method in peft.PROMPTS:
        raise LossError(
            f"{adapter.method} of {job.name} is an input of the model, which no weight can hold. Load it with its base."
        )
    if adapter.method == "FROD" and not adapter.shared:
        raise LossError(
            f"FROD of {job.name} has a basis of all weights of a kind, which its file lacks (save_projection=False). "
            "Merge it in memory, with PeftModel.from_pretrained(…).merge_and_unload(), and save that model."
        )
    layers = {path: layer for path, layer in load_layers(job, base).items() if NAME in layer.methods}
    result: list[TensorChange] = []
    asked: dict[object, bool] = {}
    if absent := [p for p, module in adapter.modules.items() if p not in layers and not isinstance(module, LowRank)]:
        raise job.misfit(absent[0], "there is no such layer in the model")
    for path, layer in layers.items():  # in UniLoRA the layers share all their tensors
        if isinstance(adapter.modules.get(path), LowRank):
            continue
        m = layer.methods[NAME]
        effect: Any = m.effect
        why = layer.why_unmergeable(NAME) or (
            "it acts on a module without a weight" if getattr(effect, "block", False) else None
        )
        if why is not None:
            raise LossError(f"{adapter.method} of {job.name} cannot be merged at '{path}': {why}.")
        if effect.whole:
            for name, p in effect.module().named_parameters():
                result += [replace(change, alone=True) for change in replace_whole(job, f"{path}.{name}", to_file(p))]
        else:
            result += list_layer_changes(job, path, layer, m, asked)
    return result


def load_layers(job: MergeJob, base: BaseDescription) -> dict[str, AdapterLayer]:
    """Return path → layer of the base's model with the adapter as "default".

    The weights are zeros that take no memory. If the file has whole tensors, the model is of its head's class, if
    known.

    A file of another format is first written as PEFT's to a temporary folder. Warnings of loading are suppressed.

    Raises:
        BaseModelMismatchError: transformers does not know the base.
    """
    kind = head_class(base.config, job.adapter) if job.adapter.full else None
    model = build_meta_model(base.path, kind)
    if model is None:
        raise BaseModelMismatchError(
            f"{job.adapter.method} of {job.name} can be merged only into a model that the installed transformers "
            f"knows, and it does not know {base.path}. Install the transformers that knows it."
        )
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")  # of a fingerprint that zeros do not have
        path = job.adapter.path
        if job.adapter.format != peft.NAME:
            peft.write(job.adapter, folder, base)
            path = folder
        peft_model = PeftModel.from_pretrained(fill_with_zeros(model), path, adapter_name=NAME)
    return find_adapter_layers(peft_model)


def list_layer_changes(
    job: MergeJob, path: str, layer: AdapterLayer, m: Method, asked: dict[object, bool]
) -> list[TensorChange]:
    """Return the changes of one layer's adapter `m`: to its weight, unless its effect keeps it, and then to its bias,
    if it changes that. Nothing is computed until a change is called; the values have the dtype of the checkpoint's
    weight, unless that is of 8 bits.

    Args:
        path: of the layer.
        asked: the cache of `changes_bias`, filled here.

    Raises:
        BaseModelMismatchError: the checkpoint holds the weight in several tensors, by expert, or in another shape; or
            the bias that would change does not exist.
    """
    name = f"{path}.{layer.site.parameter}" if not path.endswith(f".{layer.site.parameter}") else path
    (spot, *more) = job.places.locate_all([name], job.name)[name]
    shape = job.places.shapes[spot.key]
    stored_shape = tuple(layer.op.uncanon(torch.empty(layer.site.shape, device="meta")).shape)
    if more or spot.expert is not None or stored_shape != shape:
        raise job.misfit(path, f"'{spot.key}' {shape} is not the layer's weight as the model holds it")
    bias = job.places.find(f"{path}.bias")
    key = bias[0].key if bias and getattr(layer.base_layer, "bias", None) is not None else None
    kind = job.kinds.get(spot.key)  # the dtype of a model that is loaded from the checkpoint
    where = layer.where if kind is None or kind.itemsize < 2 else (layer.where[0], kind)
    layer_changes = []
    if not m.effect.keeps_weight:
        layer_changes.append(
            TensorChange(spot.key, name, partial(merge_layer_weight, job, layer, m, where, False, key), shape, (m,))
        )
    if changes_bias(layer, m, asked):
        if key is None:
            raise job.misfit(path, "it shifts the bias, and the layer has none: merged, there is no place for that")
        act = partial(merge_layer_weight, job, layer, m, where, True, spot.key)
        layer_changes.append(TensorChange(key, f"{path}.bias", act, job.places.shapes[key], (m,)))
    return layer_changes


def changes_bias(layer: AdapterLayer, m: Method, asked: dict[object, bool]) -> bool:
    """Return True if adapter `m`, the only one on its layer, changes the layer's bias.

    For an additive effect its `shift` tells, for others a fold of zeros. Computed once for layers with the same method,
    config, layer type, and bias or none; `asked` is the cache.
    """
    kind = (type(m), id(m.cfg), type(layer.op), getattr(layer.base_layer, "bias", None) is None)
    if kind not in asked:
        with torch.no_grad():
            if m.effect.additive:
                asked[kind] = m.effect.shift() is not None
            else:
                b = None if kind[-1] else torch.zeros(layer.site.out_features)
                asked[kind] = fold_adapter(layer, torch.zeros(layer.site.shape), b)[1] is not b
    return asked[kind]


def fold_adapter(
    layer: AdapterLayer, W: torch.Tensor, b: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return a weight (canonical) and bias with the layer's adapter merged into them; W and b stay as they are."""
    plan = layer.plan_for((NAME,))
    assert plan is not None
    return plan.fold(W, b)


def merge_layer_weight(
    job: MergeJob,
    layer: AdapterLayer,
    m: Method,
    where: tuple[torch.device | None, torch.dtype | None],
    of_bias: bool,
    other: str | None,
    value: torch.Tensor,
    own: Read,
) -> torch.Tensor:
    """Return the merged weight, or the merged bias, of an adapter's layer, in the checkpoint's orientation.

    Puts the checkpoint's weight and bias into the layer, computes tensors that the file lacks, and merges `value`. For
    another job weight than 1 `value` goes that part of the way. The layer gets zeros again, after an error in merging
    too, but not if computing the tensors raises.

    Args:
        where: device and dtype for the adapter's tensors.
        of_bias: `value` is the bias.
        other: the checkpoint's name of the bias, or of the weight if `value` is the bias; None: there is none.
        own: returns the checkpoint's value, before earlier adapters.
    """
    beside = None if other is None else job.read(other)
    W, b = (beside, value) if of_bias else (value, beside)
    W0, b0 = (beside, own()) if of_bias else (own(), beside)
    assert W is not None and W0 is not None
    base: nn.Module = layer.base_layer
    parameters = base._parameters
    with torch.no_grad():
        parameters[layer.site.parameter] = nn.Parameter(W0, requires_grad=False)
        if b0 is not None:
            parameters["bias"] = nn.Parameter(b0, requires_grad=False)
        layer.recompute_values(NAME, where)
        try:
            merged = fold_adapter(layer, layer.op.canon(W), b)[1 if of_bias else 0]
            assert merged is not None
            merged = merged if of_bias else layer.op.uncanon(merged)
            return merged if job.weight == 1 else torch.lerp(value, merged.to(value.dtype), job.weight)
        finally:
            parameters[layer.site.parameter] = nn.Parameter(make_expanded_zero(W0), requires_grad=False)
            if b0 is not None:
                parameters["bias"] = nn.Parameter(make_expanded_zero(b0), requires_grad=False)
