# SPDX-License-Identifier: Apache-2.0
"""A live model as files have it: the names, shapes and values of its parameters as they are without adapters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from graft.core.merging import unmerged
from graft.files.base import Skeleton
from graft.files.by_model import skeleton
from graft.files.pickles import from_torch
from graft.files.tensors import Tensor
from graft.inject.survey import survey
from graft.io.tensors import name_of


def names_in(model: Any) -> Skeleton:
    """Return names, shapes and values of a model as they are without adapters."""
    is_adapted = hasattr(model, "get_base_model")
    base: nn.Module = model.get_base_model() if is_adapted else model
    layers = survey(base).layers
    out = skeleton(base, f"the model ({type(base).__name__})")
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
            read = (lambda p=p: p.data) if layer is None else partial(unmerged, layer)
            out.tensors[plain] = Tensor(tuple(p.shape), name_of(p.dtype), partial(values_of, read, plain))
    return out


def values_of(read: Callable[[], torch.Tensor], name: str) -> bytes:
    """Return the bytes of a weight, from its device: only a format that needs values asks."""
    return bytes(from_torch(read().detach(), name).load())
