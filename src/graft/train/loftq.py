# SPDX-License-Identifier: Apache-2.0
"""LoftQ (arXiv 2310.08659) for a model that is quantized already: A and B begin with the error of the quantization."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from graft import AdapterLayer, CheckpointError, ConfigError, PeftWarning
from graft.config.hub import fetch_file
from graft.config.reading import LARGEST_HEADER, read_object
from graft.core.errors import warn
from graft.inject.parts import get_registry
from graft.methods.lora.loftq import decompose

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Set A and B of every quantized layer so that with them it is nearest to its weight before the quantization.

    Waits until no call of the model runs.

    Layers with a weight that cannot be read keep A and B, with a warning.

    Args:
        model_path: folder with the original weights as safetensors, one file or several; or that file. By default the
            copy of the base model in the hub's cache.
        callback: called with the model and a layer's path after each layer. If it returns False, the layer gets its
            values back.

    Raises:
        TypeError: the model is no PeftModel.
        ConfigError: no layer of the adapter is quantized, or it is not LoRA.
        CheckpointError, FileNotFoundError: the weights are not there, or do not fit. Whatever is raised, the adapter is
            as it was.
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
    weights = BaseWeightFiles(model_path or find_base_path(registry.model), registry.model)
    files = {key: weights.find_file(key, layer) for key, layer in layers.items()}
    change = registry.call.gate.change(f"replace_lora_weights_loftq() of '{adapter_name}'", (adapter_name,))
    with change, ExitStack() as merges, ExitStack() as undo:
        for layer in layers.values():  # merged again with the new values, or the restored ones
            merges.enter_context(layer.lift_merged())
        for key, layer in layers.items():
            method = layer.methods[adapter_name]
            W0 = layer.W0.float()
            A, B = decompose(layer.op.canon(weights.read(*files[key])).to(W0) - W0, method.cfg.r)
            root = method.scaling**0.5
            with ExitStack() as back:
                for p, value in zip(method.pair, (A / root, B / root)):
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


class BaseWeightFiles:
    """The tensors of a base model's safetensors files, read one by one.

    Attributes:
        where: the folder, or the name of the model on the hub.
        files: name of a tensor → name of its file.
        prefix: of names in memory that files may lack.
    """

    def __init__(self, where: str, model: nn.Module):
        """Find the file or the index of a folder, a file, or a model in the hub's cache. Nothing is downloaded.

        Raises:
            FileNotFoundError: there is neither.
            CheckpointError: the index names files outside its folder.
        """
        self.where = os.path.dirname(where) or "." if where.endswith(".safetensors") else where
        path = where if where.endswith(".safetensors") else fetch_file(where, FILE, local_files_only=True)
        index = None if path and os.path.isfile(path) else fetch_file(self.where, INDEX, local_files_only=True)
        if index is not None:
            self.files: dict[str, str] = read_object(index, LARGEST_HEADER).get("weight_map", {})
            named = [*self.files.values()] if isinstance(self.files, dict) else [self.files]
            if not all(isinstance(name, str) and os.path.basename(name) == name for name in named):
                raise CheckpointError(f"{index} names files outside its folder. Download it again.")
        elif path and os.path.isfile(path):
            from safetensors import safe_open

            with safe_open(path, framework="pt") as f:
                self.files = dict.fromkeys(f.keys(), os.path.basename(path))
            self.where = os.path.dirname(path)
        else:
            raise FileNotFoundError(
                f"Could not find file for {where}, ensure that there is a (sharded) safetensors file of the model."
            )
        prefix = getattr(model, "base_model_prefix", "")
        self.prefix = f"{prefix}." if prefix else ""

    def find_file(self, key: str, layer: AdapterLayer) -> tuple[str, str]:
        """Return the file's path and the tensor's name of a layer's weight. The name may lack the model's prefix.

        Raises:
            CheckpointError: no file has it, or the sizes differ from those of the layer, in any order.
            FileNotFoundError: the file that the index names is not there.
        """
        from safetensors import safe_open

        name = f"{key}.{layer.site.parameter}"
        if name not in self.files and name.startswith(self.prefix):
            name = name.removeprefix(self.prefix)
        if name not in self.files:
            raise CheckpointError(f"{self.where} has no weight for layer '{key}'. Pass the base model's folder.")
        path = fetch_file(self.where, self.files[name], local_files_only=True)
        if path is None:
            raise FileNotFoundError(f"{self.where} lacks {self.files[name]}, which its index names. Download it again.")
        with safe_open(path, framework="pt") as f:
            shape = tuple(f.get_slice(name).get_shape())
        if sorted(shape) != sorted(layer.site.shape):
            raise CheckpointError(
                f"The weight of layer '{key}' is {shape} in {path}, and {tuple(layer.site.shape)} in the model."
            )
        return path, name

    def read(self, path: str, name: str) -> Tensor:
        """Return a tensor of a file, on the CPU."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as f:
            tensor: Tensor = f.get_tensor(name)
            return tensor
