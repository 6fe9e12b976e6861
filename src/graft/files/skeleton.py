# SPDX-License-Identifier: Apache-2.0
"""The model of a folder, built from its config alone (no values, or zeros); and a checkpoint under its model's names.

No code from the folder ever runs, whatever its config says.
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
from graft.files.base import BaseDescription
from graft.files.errors import make_damage_error
from graft.files.merging.weights import NAMES, TORCH, find_base_weights, of_file, to_file
from graft.files.places import ComputedParameters, Spot, find_spots
from graft.files.tensors import EIGHT_BITS, FLOATS, Bytes, Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


CONFIG = "config.json"
# fields, at any depth, that make transformers run or download code, kernels, other configs or weights
CODE = ("auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
        "experts_implementation", "_experts_implementation", "configuration_files",
        "use_pretrained_backbone")  # fmt: skip
COUNTS = ("layer", "layers", "blocks", "experts")  # endings of fields with a number of modules
MOST = 2**12
LABELS = 2**20


def build_model_config(path: str) -> PreTrainedConfig | None:
    """Return transformers' config object for a folder's config.json.

    Returns None without that file or without transformers, or if AutoConfig raises any Exception, as for an unknown
    model or values of a wrong type. Fields that name code, kernels or other files are removed: no code of the folder
    runs, and the network is not used. `_name_or_path` of the result is `path`.

    Raises:
        CheckpointError: the file is damaged, has absurd module counts, or names a backbone that would be downloaded.
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
    """Return a config value without the fields in `CODE`, such as auto_map and attn_implementation, at any depth of
    dicts and lists.

    Other values are returned as they are.

    Raises:
        CheckpointError: an int of a dict is absurd: over 4096 in a key that ends with layer, layers, blocks or experts,
            or over 2²⁰ in "num_labels". Or a dict names a backbone by a str that would be downloaded: `backbone_config`
            is missing or empty, and `use_timm_backbone` is there and false. `file` names the config in the text.
    """
    if isinstance(value, list):
        return [drop_code_fields(v, file) for v in value]
    if not isinstance(value, dict):
        return value
    for key, n in value.items():
        if type(n) is int and n > (MOST if key.endswith(COUNTS) else LABELS if key == "num_labels" else n):
            raise make_damage_error(f"{file} says {key} = {n:,}, which no model has")
    backbone = value.get("backbone")
    if isinstance(backbone, str) and not (value.get("backbone_config") or value.get("use_timm_backbone", True)):
        raise CheckpointError(
            f"{file} names the backbone '{backbone}', which graft does not download. Write its backbone_config there."
        )
    return {key: drop_code_fields(v, file) for key, v in value.items() if key not in CODE}


def find_model_class(name: object) -> type[PreTrainedModel] | None:
    """Return the transformers model class of this name; None if it is no text, does not exist, needs a missing package,
    or is no model class.
    """
    import transformers

    try:
        attribute = getattr(transformers, name, None) if isinstance(name, str) else None
    except (ImportError, RuntimeError):  # its module needs a missing package
        return None
    return attribute if isinstance(attribute, type) and issubclass(attribute, transformers.PreTrainedModel) else None


def build_meta_model(path: str, architecture: str | None = None) -> PreTrainedModel | None:
    """Return the transformers model of a folder's config.json, on the meta device, without quantization; None if
    transformers does not know the config. Its messages are silenced.

    Args:
        architecture: name of the class to build; None: the first known class in the config. AutoModel builds the model
            if no class is known, also for an unknown `architecture`'s name.

    Raises:
        CheckpointError: as in `build_model_config`, or transformers fails to build the model.
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
        except Exception as e:  # of any type, if values contradict each other
            raise CheckpointError(f"transformers cannot build the model of {path}: {e}") from None
    return model


def fill_with_zeros(model: PreTrainedModel) -> PreTrainedModel:
    """Replace all parameters and buffers of a model, in place, by zeros expanded from one number on the default device,
    which need almost no memory. Returns the model.

    Shapes and dtypes stay. The new parameters do not require gradients.
    """
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(make_expanded_zero(p), requires_grad=False)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = make_expanded_zero(b)
    return model


def make_expanded_zero(t: torch.Tensor) -> torch.Tensor:
    """Return a single zero on the default device, expanded to the shape and with the dtype of `t`."""
    return torch.zeros((), dtype=t.dtype).expand(t.shape)


@contextlib.contextmanager
def silence_transformers() -> Iterator[None]:
    """Silence transformers' log below errors, and all warnings, within a `with` block.

    Both are settings of the whole process, and come back after an error, too.
    """
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def describe_checkpoint(base: BaseDescription) -> BaseDescription | None:
    """Return a checkpoint under the parameter names of the model in its config.

    None if the config names no class, or if `describe_config` raises any CheckpointError, for example where no
    installed library can build the model.

    The result is the model's description with the base's config. Its `tensors` are the checkpoint's: values are read
    later, quantized weights as dequantized floats. `shapes` has also the parameters that the checkpoint lacks; these
    have no entry in `tensors`.
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


def describe_model(model: nn.Module, path: str) -> BaseDescription:
    """Return the names and shapes of a live model's parameters, the names of its modules except the root, its config,
    and the model itself as `model`. Tied parameters are listed under each name, a shared module under its first name
    only. The config is a dict, {} without one. Values and buffers are not included. If `architectures` is in the config
    and empty, it becomes a list with the name of the model's class.

    Args:
        path: name of the model in messages.
    """
    config = getattr(model, "config", None) or {}
    fields = dict(config) if isinstance(config, Mapping) else config.to_dict() if hasattr(config, "to_dict") else {}
    if "architectures" in fields and not fields["architectures"]:  # as save_pretrained writes it
        fields["architectures"] = [type(model).__name__]
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    return BaseDescription(path, fields, shapes, [name for name, _ in model.named_modules() if name], model=model)


def describe_config(path: str, config: Json) -> BaseDescription:
    """Return names and shapes of the model of a config, built on the meta device by transformers from the folder, or by
    diffusers from `config` if it has `_class_name`.

    Raises:
        CheckpointError: the library is not installed, does not know the model, or cannot build it.
    """
    if (name := config.get("_class_name")) is None:
        if (model := build_meta_model(path)) is None:
            raise CheckpointError(f"{path} has no weights, and no installed library knows its model. Give its weights.")
        return describe_model(model, path)
    try:
        import diffusers

        kind = getattr(diffusers, name)
        if not issubclass(kind, diffusers.ModelMixin):
            raise TypeError(f"{name} is no model of diffusers")
        with torch.device("meta"):
            return describe_model(kind.from_config(config), path)
    except Exception as e:  # of any type, where values are not what its class takes
        raise CheckpointError(f"{path} holds no weights, and its config gives no model: {e}") from e


def dequantize_lazily(base: BaseDescription) -> dict[str, Tensor]:
    """Return a checkpoint's tensors, with each quantized weight replaced by a float32 tensor that is dequantized each
    time it is read. The parts of these weights, such as scales, are left out.

    Without a quantization config, the base's own dict is returned. If graft does not know the quantization, only
    floating tensors above 8 bits remain.
    """
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
            """Return the bytes of the dequantized weight in float32; it is dequantized anew at each call."""
            return to_file(weights.read(name).float()).load()

        out[name] = Tensor(weights.shapes[name], "F32", load)
    return out


def name_by_model(tensors: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a checkpoint's tensors under the parameter names of a model, renamed and stacked as transformers does on
    loading.

    A model without the attribute `base_model_prefix` has the checkpoint's names already: the result is a copy of the
    dict. All other models are handled, also those without a conversion of names. Stacks of several dtypes are left out,
    and parameters that transformers computes from tensors of an unknown dtype. The other computed ones are computed
    each time they are read.
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
                """Return the bytes of a parameter that transformers computes from several tensors; these are read, and
                all its parameters computed, at each call.
                """
                return to_file(source.values({key: of_file(tensors[key]) for key, _ in source.keys})[name]).load()

            out[name] = Tensor(tuple(value.shape), NAMES[value.dtype], load)
    return out


def join_spots(spots: list[Spot], tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Return the tensor of these spots: the only one, or a new stack (experts, rows, …) of all matrices, ordered by
    expert and then by first row. None if dtypes differ.

    If the first spot has no expert, its tensor is returned, whatever the others are. The number of experts is the
    largest index + 1; missing ones are not noticed. A stack's values are read later, each time they are needed.
    """
    if spots[0].expert is None:
        return tensors[spots[0].key]
    ordered = [tensors[spot.key] for spot in sorted(spots, key=lambda spot: (spot.expert or 0, spot.rows or (0, 0)))]
    first, n = ordered[0], 1 + max(spot.expert or 0 for spot in spots)
    if {t.dtype for t in ordered} != {first.dtype}:
        return None
    rows = sum(t.shape[0] for t in ordered) // n
    return Tensor((n, rows, *first.shape[1:]), first.dtype, lambda: b"".join(t.load() for t in ordered))
