# SPDX-License-Identifier: Apache-2.0
"""Load adapters of other libraries' formats onto a model, by the tensors that PEFT would have of them, in memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from graft.config.base import PeftConfig
from graft.core.errors import some
from graft.core.merging import unmerged
from graft.files.bases import Skeleton, skeleton
from graft.files.components import part_for
from graft.files.errors import LossError
from graft.files.formats import read
from graft.files.formats.peft import config_of, tensors_of
from graft.files.holding import PEFT, fit
from graft.files.lycoris import as_peft
from graft.files.names import check
from graft.files.pickles import from_torch, to_torch
from graft.files.tensors import Tensor
from graft.inject.survey import survey
from graft.io.files import Loaded
from graft.io.tensors import name_of
from graft.model.checkpoints import AdapterInMemory
from graft.model.mixed import PeftMixedModel
from graft.model.peft_model import PeftModel


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
    known = names_in(model)
    adapter = read(path, known)
    if adapter.format != "peft" or adapter.pipeline:
        adapter = part_for(adapter, known)
        check(adapter, known)
        adapter = as_peft(adapter, known)
        adapter, _ = fit(adapter, PEFT, "peft", lossy, known)
    lost: list[str] = []
    tensors = {name: to_torch(t) for name, t in tensors_of(adapter, lost).items()}
    if lost and not lossy:
        raise LossError(f"graft has no method for {some(lost)} of {adapter.path}.")
    fields = config_of(adapter, known)
    config = PeftConfig.resolve(fields["peft_type"])(**{k: v for k, v in fields.items() if k != "peft_type"})
    pair: Any = AdapterInMemory(config, Loaded(tensors, os.fspath(path)))
    if not isinstance(model, PeftModel):
        return (PeftMixedModel if mixed else PeftModel).from_pretrained(model, pair, adapter_name, **options)
    model.load_adapter(pair, adapter_name, **options)
    return model


def names_in(model: nn.Module) -> Skeleton:
    """Return names, shapes and values of a model as they are without adapters."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    out = skeleton(base, f"the model ({type(base).__name__})")
    layers = survey(base).layers
    inside = tuple(f"{path}." for path in layers)
    out.adapters = model.peft_config if isinstance(model, PeftModel) else {}
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
            read = (lambda p=p: p.data) if layer is None else partial(unmerged, layer)
            out.tensors[plain] = Tensor(tuple(p.shape), name_of(p.dtype), partial(values_of, read, plain))
    return out


def values_of(read: Callable[[], torch.Tensor], name: str) -> bytes:
    """Return the bytes of a weight, from its device: only a format that needs values asks."""
    return bytes(from_torch(read().detach(), name).load())
