# SPDX-License-Identifier: Apache-2.0
"""A checkpoint by the names of its model: as transformers loads tensors, it renames, stacks or computes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch

from graft import CheckpointError, UnsupportedLayerError
from graft.config.reading import Json
from graft.files.base import BaseFiles, Skeleton
from graft.files.merging.weights import NAMES, TORCH, of_file, to_file, weights_of
from graft.files.places import Computed, Spot, renamed
from graft.files.skeleton import skeleton as model_of
from graft.files.tensors import EIGHT_BITS, FLOATS, Bytes, Tensor

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def of_files(base: BaseFiles) -> Skeleton | None:
    """Return a checkpoint by the names of the model that its config describes; None: no library knows it.

    No tensor is read yet. A quantized weight is read as the floats that it stands for. Parameters that the checkpoint
    lacks have a shape only.
    """
    if not (base.config.get("architectures") or base.config.get("_class_name")):
        return None
    try:
        made = from_config(base.path, base.config)
    except CheckpointError:
        return None
    made.config, made.tensors = base.config, by_name(dense(base), cast("PreTrainedModel", made.model))
    made.shapes |= {name: t.shape for name, t in made.tensors.items()}
    return made


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


def from_config(path: str, config: Json) -> Skeleton:
    """Return the model that a config describes, built on the meta device by its library.

    Raises:
        CheckpointError: the library is not installed, or does not know the model.
    """
    if (name := config.get("_class_name")) is None:
        if (model := model_of(path)) is None:
            raise CheckpointError(f"{path} holds no weights, and no library here knows the model of its config.")
        return skeleton(model, path)
    try:
        import diffusers

        kind = getattr(diffusers, name)
        if not issubclass(kind, diffusers.ModelMixin):
            raise TypeError(f"{name} is no model of diffusers")
        with torch.device("meta"):
            return skeleton(kind.from_config(config), path)
    except Exception as e:  # of any type, where values are not what its class takes
        raise CheckpointError(f"{path} holds no weights, and no model can be made of its config: {e}") from e


def dense(base: BaseFiles) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, with floats in place of what holds a quantized weight."""
    if not (base.config.get("quantization_config") or base.config.get("compression_config")):
        return base.tensors
    try:
        weights = weights_of(base)
    except UnsupportedLayerError:
        return {name: t for name, t in base.tensors.items() if t.dtype in FLOATS and t.dtype not in EIGHT_BITS}
    parts = {part for names in weights.packed.values() for part in names}
    out = {name: t for name, t in base.tensors.items() if name not in parts}
    for name in weights.packed:

        def load(name: str = name) -> Bytes:
            return to_file(weights.read(name).float()).load()

        out[name] = Tensor(weights.shapes[name], "F32", load)
    return out


def by_name(tensors: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by the names of a model's parameters, as transformers loads them.

    Those of a model of another library have its names already.
    """
    if not hasattr(model, "base_model_prefix"):
        return dict(tensors)
    computed: dict[str, Computed] = {}
    spots = renamed(model, {name: t.shape for name, t in tensors.items()}, computed)
    out = {name: made for name, of in spots.items() if (made := assembled(of, tensors)) is not None}
    for source in computed.values():
        kinds = {key: TORCH.get(tensors[key].dtype) for key, _ in source.keys}
        if None in kinds.values():
            continue
        empty = {key: torch.empty(tensors[key].shape, dtype=kind, device="meta") for key, kind in kinds.items()}
        for name, value in source.values(empty).items():

            def load(source: Computed = source, name: str = name) -> Bytes:
                return to_file(source.values({key: of_file(tensors[key]) for key, _ in source.keys})[name]).load()

            out[name] = Tensor(tuple(value.shape), NAMES[value.dtype], load)
    return out


def assembled(spots: list[Spot], tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Return the tensor that stands in these spots, one or a stack of matrices; None if they have several dtypes."""
    if spots[0].expert is None:
        return tensors[spots[0].key]
    ordered = [tensors[spot.key] for spot in sorted(spots, key=lambda spot: (spot.expert or 0, spot.rows or (0, 0)))]
    first, n = ordered[0], 1 + max(spot.expert or 0 for spot in spots)
    if {t.dtype for t in ordered} != {first.dtype}:
        return None
    rows = sum(t.shape[0] for t in ordered) // n
    return Tensor((n, rows, *first.shape[1:]), first.dtype, lambda: b"".join(t.load() for t in ordered))
