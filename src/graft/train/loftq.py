# SPDX-License-Identifier: Apache-2.0
"""LoftQ (arXiv 2310.08659) for a model that is quantized already: A and B begin with the error of the quantization."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack, suppress

import torch
from torch import nn
from torch.nn.functional import pad

from graft import AdapterLayer, CheckpointError, ConfigError, PeftWarning
from graft.core.errors import warn
from graft.files.base import read_base_files
from graft.files.pickles import to_torch
from graft.files.sources import find_base
from graft.files.tensors import Tensor as FileTensor
from graft.files.tensors import read_header
from graft.inject.parts import get_registry


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Set A and B of every quantized linear layer to the best approximation, by SVD, of the difference between its
    weight before the quantization and its weight now. Waits until no call of the model runs.

    If the rank is above the smaller side of a weight, the rest of A and B is 0. Layers with a weight that cannot be
    read keep A and B, with a PeftWarning. Merged adapters are unmerged meanwhile, and merged again.

    Args:
        model_path: folder with the original weights as safetensors, one file or several; or that file. By default the
            copy of the base model in the hub's cache.
        callback: called with the model and a layer's path after each layer. If it returns False, the layer gets its
            values back.

    Raises:
        TypeError: the model is no PeftModel.
        ConfigError: no layer of the adapter is quantized, it is not LoRA, or a layer's scaling is 0.
        AdapterNotFoundError: there is no such adapter.
        InUseError: calls of the model last longer than its `change_timeout`.
        CheckpointError, FileNotFoundError: the weights are not there, or do not fit. Whatever is raised, also by
            `callback`, the adapter is as it was.
    """
    registry = get_registry(peft_model)
    if registry is None:
        raise TypeError("The passed model does not appear to be a valid PeftModel")
    registry.check_known([adapter_name])
    with_adapter = {key: layer for key, layer in registry.layers.items() if adapter_name in layer.methods}
    packed = {key: m for key, m in with_adapter.items() if not m.store.exact and m.op.linear and hasattr(m, "lora_A")}
    reasons = {key: m.base_weight.why_unreadable() for key, m in packed.items()}
    layers = {key: m for key, m in packed.items() if reasons[key] is None}
    if not layers:
        why = f"layer '{next(iter(packed))}' cannot be read: {reasons[next(iter(packed))]}." if packed else ""
        raise ConfigError(f"No bnb LoRA module found on the model: {why or 'no layer of the adapter is quantized.'}")
    if len(layers) < len(packed):
        key = next(key for key in packed if key not in layers)
        warn(f"{len(packed) - len(layers)} layers keep their A and B, such as '{key}': {reasons[key]}.", PeftWarning)
    where = model_path or find_base_path(registry.model)
    in_files, prefix = read_base_weights(where), f"{getattr(registry.model, 'base_model_prefix', '')}."
    weights = {key: find_weight(in_files, key, layer, prefix, where) for key, layer in layers.items()}
    change = registry.call.gate.change(f"replace_lora_weights_loftq() of '{adapter_name}'", (adapter_name,))
    with change, ExitStack() as merges, ExitStack() as undo:
        for layer in layers.values():  # merged again with the new values, or the restored ones
            merges.enter_context(layer.lift_merged())
        for key, layer in layers.items():
            method = layer.methods[adapter_name]
            W0 = layer.W0.float()
            U, S, Vh = torch.linalg.svd(layer.op.canon(to_torch(weights[key])).to(W0) - W0, full_matrices=False)
            r, scaling = method.cfg.r, method.scaling
            if not scaling:
                raise ConfigError(f"Layer '{key}' has a scaling of 0 for adapter '{adapter_name}'. Set another.")
            root, zeros = (S / abs(scaling)).sqrt(), max(0, r - len(S))
            A = pad(root[:r, None] * Vh[:r], (0, 0, 0, zeros))
            B = pad(U[:, :r] * root[:r] * (scaling / abs(scaling)), (0, zeros))
            with ExitStack() as back:
                for p, value in zip(method.pair, (A, B)):
                    back.callback(p.copy_, p.detach().clone())
                    p.copy_(value)
                if callback is None or callback(peft_model, key):
                    undo.push(back.pop_all())
        undo.pop_all()


def find_base_path(model: nn.Module) -> str:
    """Return `_name_or_path` of the model's config. Raises ConfigError if it has none."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not name:
        raise ConfigError(
            "The provided model does not appear to be a transformers model or is a local model. In this case, you must "
            "pass the model_path argument that points to the safetensors file."
        )
    return str(name)


def read_base_weights(where: str) -> dict[str, FileTensor]:
    """Return the tensors of a base model's safetensors files, unread, by name. Nothing is downloaded.

    Args:
        where: a file, a folder, or the name of a model in the hub's cache. A path that ends with .safetensors and is no
            file means its folder, "." for a bare name.

    Raises:
        FileNotFoundError: there are none.
        CheckpointError: a file is damaged or missing, or an index names files outside its folder.
    """
    if os.path.isfile(where):
        return read_header(where)[0]
    folder = os.path.dirname(where) or "." if where.endswith(".safetensors") else where
    with suppress(CheckpointError):  # no model of that name in the cache
        folder = find_base(folder)
    if not os.path.isdir(folder) or not any(name.endswith(".safetensors") for name in os.listdir(folder)):
        raise FileNotFoundError(
            f"Could not find file for {where}, ensure that there is a (sharded) safetensors file of the model."
        )
    return read_base_files(folder).tensors


def find_weight(weights: dict[str, FileTensor], key: str, layer: AdapterLayer, prefix: str, where: str) -> FileTensor:
    """Return the tensor of a layer's weight, unread. Its name may lack the model's prefix.

    Raises:
        CheckpointError: no file has it, or the sizes differ from those of the layer, in any order.
    """
    name = f"{key}.{layer.site.parameter}"
    weight = weights.get(name) or weights.get(name.removeprefix(prefix))
    if weight is None:
        raise CheckpointError(f"{where} has no weight for layer '{key}'. Pass the base model's folder.")
    if sorted(weight.shape) != sorted(layer.site.shape):
        raise CheckpointError(
            f"The weight of layer '{key}' is {weight.shape} in {where}, and {tuple(layer.site.shape)} in the model."
        )
    return weight
