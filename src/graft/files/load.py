# SPDX-License-Identifier: Apache-2.0
"""Load adapter files of other libraries onto a model, by converting them in memory to the tensors of PEFT's format.

The live model is the base: its names, shapes and values without adapters.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from graft import AdapterLayer, BaseModelMismatchError, LossError, PeftConfig, PeftMixedModel, PeftModel
from graft.config.pair import AdapterInMemory
from graft.core.errors import join_some, shorten_text
from graft.files.base import BaseDescription
from graft.files.formats import read
from graft.files.formats.peft import complete_config, name_tensors
from graft.files.holding import PEFT, fit_to_format
from graft.files.lycoris import lycoris_to_peft
from graft.files.merging.weights import NAMES
from graft.files.names import check_modules, rename_modules, rename_tensor, select_pipeline_part
from graft.files.neutral import AdapterFile
from graft.files.pickles import from_torch, to_torch
from graft.files.skeleton import describe_model
from graft.files.tensors import Tensor


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
        model: a PeftModel, which gets one more adapter, or a model without adapters, which becomes a PeftModel. The
            names of its modules give the file's names their meaning.
        path: a file or folder. Of a pipeline's file only the part that fits the model is loaded. AdapterFusion needs a
            PeftMixedModel with the bottlenecks, under the names that the file has for them.
        mixed: turn a model without adapters into a PeftMixedModel, for adapters of several methods.
        lossy: drop the parts that graft has no method for.
        options: of `PeftModel.from_pretrained`, or of its `load_adapter` for a PeftModel, such as `is_trainable`.

    Returns:
        The PeftModel. On a PeftModel that was passed in, the new adapter is inactive.

    Raises:
        CheckpointError: the file is damaged, or no adapter.
        BaseModelMismatchError: the model lacks modules of the adapter, or has weights of other shapes. Names of earlier
            transformers versions are tried, too.
        LossError: graft has no method for a part of the file, and `lossy` is False.
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
        raise LossError(f"graft has no method for {join_some(lost)} of {adapter.path}. Pass lossy=True for the rest.")
    fields = complete_config(adapter, known)
    config = PeftConfig.resolve(fields["peft_type"])(**{k: v for k, v in fields.items() if k != "peft_type"})
    pair: Any = AdapterInMemory(config, tensors, os.fspath(path))
    if not isinstance(model, PeftModel):
        return (PeftMixedModel if mixed else PeftModel).from_pretrained(model, pair, adapter_name, **options)
    model.load_adapter(pair, adapter_name, **options)
    return model


def read_part_of_model(path: str | os.PathLike[str], known: BaseDescription) -> AdapterFile:
    """Read an adapter file under a model's names; of a pipeline's file return the part that fits the model.

    Module names with one prefix more or less than the model's are renamed. PEFT's own format, except for a pipeline, is
    not checked here. Raises BaseModelMismatchError if modules or shapes do not fit.
    """
    adapter = read(path, known)
    if adapter.format != "peft" or adapter.is_pipeline:
        adapter = select_pipeline_part(adapter, known)
        adapter_prefix, base_prefix = getattr(check_modules(adapter, known), "shift", ("", ""))
        if adapter_prefix != base_prefix:
            paths = [*adapter.modules, *(name.rpartition(".")[0] for name in (*adapter.full, *adapter.rows))]
            adapter = rename_modules(adapter, {path: base_prefix + path.removeprefix(adapter_prefix) for path in paths})
    return adapter


def list_former_names(known: BaseDescription) -> dict[str, str] | None:
    """Return module path → path in earlier versions of transformers, for all modules of a description that has its live
    `model`; None if all are equal.
    """
    from graft.io.servers import ServerBlocks

    assert known.model is not None
    experts = ServerBlocks(known.model)
    names = {path: experts.find_old_path(path) for path in known.modules}
    return names if any(old != new for new, old in names.items()) else None


def rename_base_modules(known: BaseDescription, names: Mapping[str, str]) -> BaseDescription:
    """Return a copy of a base's description with other module paths, also in the names of shapes and tensors.

    Args:
        names: old path → new path. Its values become the list of modules; tensors of other modules keep their names.
    """
    shapes = {rename_tensor(name, names): shape for name, shape in known.shapes.items()}
    tensors = {rename_tensor(name, names): tensor for name, tensor in known.tensors.items()}
    return replace(known, shapes=shapes, modules=[*names.values()], tensors=tensors)


def describe_base_of(model: Any) -> BaseDescription:
    """Return names, shapes and lazily read values of a model without its adapters, even if some are merged.

    For a PeftModel it is the base model, with the adapters' configs in `adapters`; modules inside adapted layers are
    left out. Names of adapted layers lose `.base_layer`. Values of an adapted weight are those without merged adapters.
    Meta tensors, integers and tensor subclasses have a shape but no values.

    Raises:
        TypeError: `model` is a class or no module.
    """
    if not isinstance(model, nn.Module):
        text = f"{shorten_text(repr(model))}. Load it first"
        if isinstance(model, type):
            text = f"the class {model.__name__}. Make an object of it"
        raise TypeError(f"A model has to be a torch.nn.Module, got {text}.")
    is_adapted = hasattr(model, "get_base_model")
    base: nn.Module = model.get_base_model() if is_adapted else model
    layers = find_adapter_layers(base)
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
        if p.device.type != "meta" and p.dtype in NAMES and p.is_floating_point() and type(p.data) is type(p.detach()):
            layer = layers.get(plain.removesuffix(".weight")) if of_layer else None
            read = (lambda p=p: p.data) if layer is None else (lambda layer=layer: layer.op.uncanon(layer.W0))
            out.tensors[plain] = Tensor(tuple(p.shape), NAMES[p.dtype], partial(read_weight_bytes, read, plain))
    return out


def find_adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """Return path in the base model → layer, for the layers in a model that carry adapters."""
    return {m.key: m for m in model.modules() if isinstance(m, AdapterLayer) and m.methods}


def read_weight_bytes(read: Callable[[], torch.Tensor], name: str) -> bytes:
    """Return the bytes of the tensor that `read` returns, copied to the CPU."""
    return bytes(from_torch(read().detach(), name).load())
