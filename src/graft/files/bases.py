# SPDX-License-Identifier: Apache-2.0
"""Base models in the forms in which people have them: folders of weights, of a pipeline, a config, a live model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from graft.config.reading import Json, read_object
from graft.core.errors import CheckpointError
from graft.files.base import BaseFiles, base_files
from graft.files.tensors import Tensor

if TYPE_CHECKING:
    from torch import nn

PIPELINE, CONFIG = "model_index.json", "config.json"
COMPONENTS = ("unet", "transformer", "text_encoder")  # of a pipeline, that adapters are for; more end in a number

PACKED = {"mxfp4": "mxfp4", "fp8": "fp8", "bitsandbytes": "nf4"}  # quant_method of a config → format


def packing(config: Json) -> str | None:
    """Return the format of weights, as of `budget`, that a model's config.json says; None for none, or another."""
    said = config.get("quantization_config") or {}
    return None if said.get("load_in_8bit") else PACKED.get(str(said.get("quant_method")))


def base_of(path: str | os.PathLike[str]) -> BaseFiles | Skeleton:
    """Look at a base model without its weights.

    Args:
        path: a folder with safetensors files, or of a diffusers pipeline, or with a config.json alone; or that file.

    Raises:
        CheckpointError: it is none of these, or damaged.
    """
    path = os.fspath(path)
    if os.path.basename(path) == CONFIG and os.path.isfile(path):
        path = os.path.dirname(path) or "."
    if os.path.exists(os.path.join(path, PIPELINE)):
        return pipeline(path)
    config = os.path.join(path, CONFIG)
    if os.path.exists(config) and not any(name.endswith(".safetensors") for name in os.listdir(path)):
        return from_config(path, read_object(config))
    return base_files(path)


def pipeline(path: str) -> Skeleton:
    """Return the models of a diffusers pipeline as one: the name of its part stands before each tensor's."""
    out = Skeleton(path, read_object(os.path.join(path, PIPELINE)))
    for part in sorted(os.listdir(path)):
        folder = os.path.join(path, part)
        if os.path.exists(os.path.join(folder, CONFIG)) and part.startswith(COMPONENTS):
            model = base_of(folder)
            out.shapes |= {f"{part}.{name}": shape for name, shape in model.shapes.items()}
            out.tensors |= {f"{part}.{name}": tensor for name, tensor in model.tensors.items()}
            out.modules += [f"{part}.{name}" for name in model.modules]
    if not out.modules:
        raise CheckpointError(f"{path} holds no models of a pipeline.")
    return out


@dataclass
class Skeleton:
    """A model of which names and shapes are known, and values only of some tensors."""

    path: str
    config: Json = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)  # those that have values
    adapters: Mapping[str, object] = field(default_factory=dict)  # configs of those that it carries, by name
    model: nn.Module | None = None  # itself, if it is there


Known = BaseFiles | Skeleton


def skeleton(model: nn.Module, path: str) -> Skeleton:
    """Return the names and shapes of a model, an `nn.Module` on any device.

    Args:
        path: what to call it in errors.
    """
    config = getattr(model, "config", None) or {}
    fields = dict(config) if isinstance(config, Mapping) else config.to_dict() if hasattr(config, "to_dict") else {}
    if "architectures" in fields and not fields["architectures"]:  # as a save writes it
        fields["architectures"] = [type(model).__name__]
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    return Skeleton(path, fields, shapes, [name for name, _ in model.named_modules() if name], model=model)


def wider(base: object) -> Skeleton | None:
    """Return a base of files with the names of the model that its config describes; None: no library makes it.

    A model may call its modules otherwise than its files do, and has those that share a weight with others.
    """
    if not isinstance(base, BaseFiles):
        return None
    try:
        made = from_config(base.path, base.config)
    except CheckpointError:
        return None
    modules = [*dict.fromkeys([*made.modules, *base.modules])]
    return Skeleton(base.path, base.config, made.shapes | base.shapes, modules, base.tensors)


def from_config(path: str, config: Json) -> Skeleton:
    """Return the model that a config describes, built on the meta device by its library.

    Raises:
        CheckpointError: the library is not installed, or does not know the model.
    """
    import torch

    try:
        if name := config.get("_class_name"):
            import diffusers

            with torch.device("meta"):
                return skeleton(getattr(diffusers, name).from_config(config), path)
        import transformers

        made = transformers.AutoConfig.from_pretrained(path)
        kind = getattr(transformers, (config.get("architectures") or [""])[0], None)
        with torch.device("meta"):
            return skeleton(transformers.AutoModel.from_config(made) if kind is None else kind(made), path)
    except (ImportError, AttributeError, ValueError, KeyError, TypeError, OSError) as e:
        raise CheckpointError(f"{path} holds no weights, and no model can be made of its config: {e}") from e
