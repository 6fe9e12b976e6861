# SPDX-License-Identifier: Apache-2.0
"""Load adapters of other libraries' formats onto a model, by the tensors that PEFT would have of them, in memory.

A live model counts as a base of files: the names, shapes and values of its parameters as they are without adapters.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from graft import BaseModelMismatchError, LossError, PeftConfig, PeftMixedModel, PeftModel
from graft.core.errors import join_some
from graft.core.merging import compute_unmerged_weight
from graft.files.base import Skeleton
from graft.files.formats import read
from graft.files.formats.peft import complete_config, name_tensors
from graft.files.holding import PEFT, fit_to_format
from graft.files.lycoris import lycoris_to_peft
from graft.files.names import check_modules, rename_modules, select_pipeline_part
from graft.files.neutral import AdapterFile
from graft.files.pickles import from_torch, to_torch
from graft.files.skeleton import describe_model
from graft.files.tensors import Tensor
from graft.inject.experts import ExpertStacks
from graft.inject.survey import survey_model
from graft.io.files import LoadedWeights
from graft.io.tensors import name_dtype
from graft.model.checkpoints import AdapterInMemory


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    lossy: bool = False,
    mixed: bool = False,
    **options: Any,
) -> PeftModel:
    """Load an adapter of any format that graft reads onto a model: PEFT, kohya, LyCORIS, diffusers, MLX, GGUF, …

    Args:
        model: a PeftModel, which gets one adapter more, or a model without adapters, which becomes one. Its modules'
            names tell what the file means.
        path: a file or folder. Of a pipeline's file the part is taken that the model has the names of. AdapterFusion
            goes to a PeftMixedModel that has the bottlenecks by the names that the file gives them.
        mixed: a model without adapters becomes a PeftMixedModel, for adapters of several methods.
        lossy: leave out what graft has no method for.
        options: of `PeftModel.from_pretrained` or of its `load_adapter`: `is_trainable`.

    Returns:
        The PeftModel; with one, the adapter is loaded beside the others, inactive.

    Raises:
        CheckpointError: the file is damaged, or no adapter.
        BaseModelMismatchError: the model has no such modules, or weights of other shapes.
        LossError: the file has what graft has no method for, and `lossy` is False.
    """
    known = describe_base_of(model)
    try:
        adapter = read_part_of_model(path, known)
    except BaseModelMismatchError:
        if (before := list_former_names(known)) is None:
            raise
        adapter = rename_modules(
            read_part_of_model(path, rename_base_modules(known, before)), {old: new for new, old in before.items()}
        )
    if adapter.format != "peft" or adapter.is_pipeline:
        adapter, _ = fit_to_format(lycoris_to_peft(adapter, known), PEFT, "peft", lossy, known)
    lost: list[str] = []
    tensors = {name: to_torch(t) for name, t in name_tensors(adapter, lost).items()}
    if lost and not lossy:
        raise LossError(f"graft has no method for {join_some(lost)} of {adapter.path}.")
    fields = complete_config(adapter, known)
    config = PeftConfig.resolve(fields["peft_type"])(**{k: v for k, v in fields.items() if k != "peft_type"})
    pair: Any = AdapterInMemory(config, LoadedWeights(tensors, os.fspath(path)))
    if not isinstance(model, PeftModel):
        return (PeftMixedModel if mixed else PeftModel).from_pretrained(model, pair, adapter_name, **options)
    model.load_adapter(pair, adapter_name, **options)
    return model


def read_part_of_model(path: str | os.PathLike[str], known: Skeleton) -> AdapterFile:
    """Return the adapter of a file, of a pipeline's that of the part which a model is, after a look at its names."""
    adapter = read(path, known)
    if adapter.format != "peft" or adapter.is_pipeline:
        adapter = select_pipeline_part(adapter, known)
        adapter_prefix, base_prefix = getattr(check_modules(adapter, known), "shift", ("", ""))
        if adapter_prefix != base_prefix:
            paths = [*adapter.modules, *(name.rpartition(".")[0] for name in (*adapter.full, *adapter.rows))]
            adapter = rename_modules(adapter, {path: base_prefix + path.removeprefix(adapter_prefix) for path in paths})
    return adapter


def list_former_names(known: Skeleton) -> dict[str, str] | None:
    """Return the names that a model's modules had in earlier versions of transformers, by today's; None: the same."""
    experts = ExpertStacks(known.model)
    names = {path: experts.find_old_path(path) for path in known.modules}
    return names if any(old != new for new, old in names.items()) else None


def rename_base_modules(known: Skeleton, names: Mapping[str, str]) -> Skeleton:
    """Return a model with other names for its modules."""

    def new_name(name: str) -> str:
        module, _, leaf = name.rpartition(".")
        return f"{names[module]}.{leaf}" if module in names else name

    return replace(
        known, shapes={new_name(name): shape for name, shape in known.shapes.items()}, modules=[*names.values()],
        tensors={new_name(name): tensor for name, tensor in known.tensors.items()},
    )  # fmt: skip


def describe_base_of(model: Any) -> Skeleton:
    """Return names, shapes and values of a model as they are without adapters."""
    is_adapted = hasattr(model, "get_base_model")
    base: nn.Module = model.get_base_model() if is_adapted else model
    layers = survey_model(base).layers
    out = describe_model(base, f"the model ({type(base).__name__})")
    inside = tuple(f"{path}." for path in layers)
    out.adapters = model.peft_config if is_adapted else {}
    out.modules = [name for name in out.modules if not name.startswith(inside)] if inside else out.modules
    for name, p in [*base.named_parameters(remove_duplicate=False)]:
        of_layer = next((path for path in inside if name.startswith(path)), None)
        plain = name.replace(".base_layer.", ".") if of_layer else name
        if of_layer and ".base_layer." not in name:
            out.shapes.pop(name, None)
            continue
        out.shapes[plain] = tuple(p.shape)
        if p.device.type != "meta" and p.is_floating_point() and type(p.data) is type(p.detach()):
            layer = layers.get(plain.removesuffix(".weight")) if of_layer else None
            read = (lambda p=p: p.data) if layer is None else partial(compute_unmerged_weight, layer)
            out.tensors[plain] = Tensor(tuple(p.shape), name_dtype(p.dtype), partial(read_weight_bytes, read, plain))
    return out


def read_weight_bytes(read: Callable[[], torch.Tensor], name: str) -> bytes:
    """Return the bytes of a weight, from its device: only a format that needs values asks."""
    return bytes(from_torch(read().detach(), name).load())
