# SPDX-License-Identifier: Apache-2.0
"""The base model's state dict, without adapters."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext

from torch import Tensor, nn

from graft.core.carrier import carrier_of
from graft.core.wrappers import find_inner_module
from graft.inject.parts import AdapterCarriers, ParameterLayerPaths, find_gate, get_registry, unwrap_model
from graft.storage.parallel import strip_inner_wrappers


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the base model's tensors under their original names, as one dict.

    Tensors of adapters are left out, and names contain no carriers or wrappers.
    """
    base = _get_base(model)
    named = ((find_original_name(base, k), v) for k, v in base.state_dict().items())
    return {name: v for name, v in named if name is not None}


def set_base_model_state_dict(
    model: nn.Module, state_dict: dict[str, Tensor], strict: bool = True
) -> tuple[list[str], list[str]]:
    """Load tensors under their original names into the base model, in place.

    Return (missing keys, unexpected keys), of the type that torch's `load_state_dict` returns.

    The load is a change of the model: it waits until no call runs. Unexpected tensors are ignored, tensors of missing
    keys stay. With `strict`, keys are checked before any tensor is written.

    Raises:
        RuntimeError: with `strict`, keys are missing or unexpected; or shapes differ.
    """
    base = _get_base(model)
    names = {name: k for k in base.state_dict() if (name := find_original_name(base, k)) is not None}
    missing = [k for k in names if k not in state_dict]
    unexpected = [k for k in state_dict if k not in names]
    if strict and (missing or unexpected):
        text = f"Missing key(s) in state_dict: {missing}. " if missing else ""
        text += f"Unexpected key(s) in state_dict: {unexpected}." if unexpected else ""
        raise RuntimeError(f"Error(s) in loading the base model: {text}")
    gate = find_gate(model)
    with nullcontext() if gate is None else gate.change("set_base_model_state_dict()"):
        result = base.load_state_dict({names[k]: v for k, v in state_dict.items() if k in names}, strict=False)
    kind: Callable[..., tuple[list[str], list[str]]] = type(result)
    return kind(missing, unexpected)


def _get_base(model: nn.Module) -> nn.Module:
    """Return the base model of a PeftModel, from within wrappers.

    Without a registry, the innermost module within wrappers such as DDP.
    """
    model = unwrap_model(model)
    registry = get_registry(model)
    return registry.model if registry is not None else model


def find_original_name(base: nn.Module, key: str) -> str | None:
    """Return a state dict key of the base without the carriers' inner names on its path; None if the tensor is an
    adapter's.

    The key is walked part by part. A part after a carrier is dropped if it is the carrier's inner name; any other part
    there is an adapter's. All other parts stay, a wrapper's name too. If a module has no child of the part's name but
    wraps another module, the walk continues there: some wrappers leave their name out of keys.
    """
    module: nn.Module | None = base
    parts = []
    for part in key.split("."):
        while module is not None and part not in module._modules and (inner := find_inner_module(module)) is not None:
            module = inner  # some wrappers leave their name out of keys in state dicts
        if module is None or carrier_of(module) is None:
            parts.append(part)
        elif part != module.inner_name:
            return None
        module = None if module is None else module._modules.get(part)
    return ".".join(parts)


def remove_carrier_names(key: str) -> str:
    """Return a key without "base_layer", "original_module" and "token_adapter" between other names."""
    return re.sub(r"\.(base_layer|original_module|token_adapter)(?=\.)", "", key)


def make_file_namer(parts: AdapterCarriers) -> Callable[[str], str]:
    """Return a function from a base tensor's name in memory to its name in the adapter's file.

    The file knows only the layers of this adapter; in memory others may be around the same modules.
    """
    nests = ParameterLayerPaths(parts.layers.values())
    layers = {strip_inner_wrappers(key): layer for key, layer in parts.layers.items()}

    def name_in_file(name: str) -> str:
        """Return the name in the file, without wrappers' parts.

        It has "base_layer" below a layer of the adapter, unless that is opaque, and below the adapter's layers of
        parameters. Such parts in `name` are dropped first.
        """
        stem, _, leaf = re.sub(r"\.base_layer(?=\.)", "", name).rpartition(".")
        layer = layers.get(stem)
        inner = "" if layer is None or layer.op.opaque else ".base_layer"
        return strip_inner_wrappers(nests.path(f"{stem}{inner}.{leaf}" if stem else leaf))

    return name_in_file
