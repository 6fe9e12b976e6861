# SPDX-License-Identifier: Apache-2.0
"""The model of a folder by its config alone, without values or with zeros; a checkpoint by the names of its model.

No code of the folder ever runs, whatever its config says.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from graft import CheckpointError, UnsupportedLayerError
from graft.config.reading import Json, read_object
from graft.files.base import BaseFiles, Skeleton
from graft.files.merging.weights import NAMES, TORCH, find_base_weights, of_file, to_file
from graft.files.places import ComputedParameters, Spot, find_spots
from graft.files.tensors import EIGHT_BITS, FLOATS, Bytes, Tensor

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel


CONFIG = "config.json"
# fields, at any depth, that make transformers run or fetch what others wrote: classes, kernels, other configs, weights
CODE = ("auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
        "experts_implementation", "_experts_implementation", "configuration_files",
        "use_pretrained_backbone")  # fmt: skip
COUNTS = ("layer", "layers", "blocks", "experts")  # ends of fields that say how many modules a model has
MOST = 2**12
LABELS = 2**20


def build_model_config(path: str) -> PreTrainedConfig | None:
    """Return the config that transformers makes of a folder's config.json; None if it knows no such model.

    Fields that name code, kernels or files elsewhere are left out: nothing of the folder runs, nobody is asked, and
    the network is not used.

    Raises:
        CheckpointError: the file is damaged, asks for more modules than any model has, or names a backbone elsewhere.
    """
    file = os.path.join(path, CONFIG)
    if not os.path.isfile(file):
        return None
    try:
        from transformers import AutoConfig
    except ImportError:
        return None
    fields = drop_code_fields(read_object(file, finite=False), file)
    with silence_transformers(), tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, CONFIG), "w", encoding="utf-8") as f:
            json.dump(fields, f)
        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception:  # of any type, where values are not what its class takes
            return None
    config._name_or_path = path
    return config


def drop_code_fields(value: Any, file: str) -> Any:
    """Return a value of a config without the fields that transformers must not see. Raises as `build_model_config`."""
    if isinstance(value, list):
        return [drop_code_fields(v, file) for v in value]
    if not isinstance(value, dict):
        return value
    for key, n in value.items():
        if type(n) is int and n > (MOST if key.endswith(COUNTS) else LABELS if key == "num_labels" else n):
            raise CheckpointError(f"{file} says {key} = {n:,}, which no model has: it is damaged.")
    backbone = value.get("backbone")
    if isinstance(backbone, str) and not (value.get("backbone_config") or value.get("use_timm_backbone", True)):
        raise CheckpointError(
            f"{file} names the backbone '{backbone}', which graft does not fetch: write its config there, as "
            "backbone_config."
        )
    return {key: drop_code_fields(v, file) for key, v in value.items() if key not in CODE}


def find_model_class(name: object) -> type[PreTrainedModel] | None:
    """Return transformers' model class of a name; None if the name is of nothing there, or of something else."""
    import transformers

    try:
        attribute = getattr(transformers, name, None) if isinstance(name, str) else None
    except (ImportError, RuntimeError):  # its module needs a package that is not there
        return None
    return attribute if isinstance(attribute, type) and issubclass(attribute, transformers.PreTrainedModel) else None


def build_meta_model(path: str, architecture: str | None = None) -> PreTrainedModel | None:
    """Return the model that transformers makes of a folder's config.json, without values; None if it knows none.

    Args:
        architecture: the name of another class than the config's.

    Raises:
        CheckpointError: as `build_model_config`; or transformers cannot make the model.
    """
    config = build_model_config(path)
    if config is None:
        return None
    import transformers

    named = [architecture] if architecture else getattr(config, "architectures", None)
    kinds = map(find_model_class, named if isinstance(named, list) else ())
    kind = next((kind for kind in kinds if kind is not None), None)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    with silence_transformers():
        try:
            with torch.device("meta"):
                model: PreTrainedModel = transformers.AutoModel.from_config(config) if kind is None else kind(config)
        except Exception as e:  # of any type, where values do not fit each other
            raise CheckpointError(f"transformers cannot make the model of {path}: {e}") from None
    return model


def fill_with_zeros(model: PreTrainedModel) -> PreTrainedModel:
    """Give the tensors of a model on the meta device memory: that of one zero each."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(make_expanded_zero(p), requires_grad=False)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = make_expanded_zero(b)
    return model


def make_expanded_zero(t: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), dtype=t.dtype).expand(t.shape)


@contextlib.contextmanager
def silence_transformers() -> Iterator[None]:
    """Keep transformers from talking about configs."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def describe_checkpoint(base: BaseFiles) -> Skeleton | None:
    """Return a checkpoint by the names of the model that its config describes; None: no library knows it.

    No tensor is read yet. A quantized weight is read as the floats that it stands for. Parameters that the checkpoint
    lacks have a shape only.
    """
    if not (base.config.get("architectures") or base.config.get("_class_name")):
        return None
    try:
        view = describe_config(base.path, base.config)
    except CheckpointError:
        return None
    view.config, view.tensors = base.config, name_by_model(dequantize_lazily(base), cast("PreTrainedModel", view.model))
    view.shapes |= {name: t.shape for name, t in view.tensors.items()}
    return view


def describe_model(model: nn.Module, path: str) -> Skeleton:
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


def describe_config(path: str, config: Json) -> Skeleton:
    """Return the model that a config describes, built on the meta device by its library.

    Raises:
        CheckpointError: the library is not installed, or does not know the model.
    """
    if (name := config.get("_class_name")) is None:
        if (model := build_meta_model(path)) is None:
            raise CheckpointError(f"{path} holds no weights, and no library here knows the model of its config.")
        return describe_model(model, path)
    try:
        import diffusers

        kind = getattr(diffusers, name)
        if not issubclass(kind, diffusers.ModelMixin):
            raise TypeError(f"{name} is no model of diffusers")
        with torch.device("meta"):
            return describe_model(kind.from_config(config), path)
    except Exception as e:  # of any type, where values are not what its class takes
        raise CheckpointError(f"{path} holds no weights, and no model can be made of its config: {e}") from e


def dequantize_lazily(base: BaseFiles) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, with floats in place of what holds a quantized weight."""
    if not (base.config.get("quantization_config") or base.config.get("compression_config")):
        return base.tensors
    try:
        weights = find_base_weights(base)
    except UnsupportedLayerError:
        return {name: t for name, t in base.tensors.items() if t.dtype in FLOATS and t.dtype not in EIGHT_BITS}
    parts = {part for names in weights.packed.values() for part in names}
    out = {name: t for name, t in base.tensors.items() if name not in parts}
    for name in weights.packed:

        def load(name: str = name) -> Bytes:
            return to_file(weights.read(name).float()).load()

        out[name] = Tensor(weights.shapes[name], "F32", load)
    return out


def name_by_model(tensors: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by the names of a model's parameters, as transformers loads them.

    Those of a model of another library have its names already.
    """
    if not hasattr(model, "base_model_prefix"):
        return dict(tensors)
    computed: dict[str, ComputedParameters] = {}
    spots = find_spots(model, {name: t.shape for name, t in tensors.items()}, computed)
    out = {name: stacked for name, of in spots.items() if (stacked := join_spots(of, tensors)) is not None}
    for source in computed.values():
        kinds = {key: TORCH.get(tensors[key].dtype) for key, _ in source.keys}
        if None in kinds.values():
            continue
        empty = {key: torch.empty(tensors[key].shape, dtype=kind, device="meta") for key, kind in kinds.items()}
        for name, value in source.values(empty).items():

            def load(source: ComputedParameters = source, name: str = name) -> Bytes:
                return to_file(source.values({key: of_file(tensors[key]) for key, _ in source.keys})[name]).load()

            out[name] = Tensor(tuple(value.shape), NAMES[value.dtype], load)
    return out


def join_spots(spots: list[Spot], tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Return the tensor that stands in these spots, one or a stack of matrices; None if they have several dtypes."""
    if spots[0].expert is None:
        return tensors[spots[0].key]
    ordered = [tensors[spot.key] for spot in sorted(spots, key=lambda spot: (spot.expert or 0, spot.rows or (0, 0)))]
    first, n = ordered[0], 1 + max(spot.expert or 0 for spot in spots)
    if {t.dtype for t in ordered} != {first.dtype}:
        return None
    rows = sum(t.shape[0] for t in ordered) // n
    return Tensor((n, rows, *first.shape[1:]), first.dtype, lambda: b"".join(t.load() for t in ordered))
