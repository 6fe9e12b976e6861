# SPDX-License-Identifier: Apache-2.0
"""Base models in the forms in which people have them: folders of weights, of a pipeline, a config, a live model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Set
from typing import TYPE_CHECKING

from graft import CheckpointError
from graft.config.reading import Json, read_object
from graft.files.base import BaseDescription, BaseFiles, Skeleton, read_base_files
from graft.files.places import find_prefix_shift

if TYPE_CHECKING:
    pass

PIPELINE, CONFIG = "model_index.json", "config.json"
COMPONENTS = ("unet", "transformer", "text_encoder")  # of a pipeline, that adapters are for; more end in a number

PACKED = {"mxfp4": "mxfp4", "fp8": "fp8", "bitsandbytes": "nf4"}  # quant_method of a config → format


def read_quantization_format(config: Json) -> str | None:
    """Return the format of weights, as of `budget`, that a model's config.json says; None for none, or another."""
    quantization = config.get("quantization_config") or {}
    return None if quantization.get("load_in_8bit") else PACKED.get(str(quantization.get("quant_method")))


def open_base(path: str | os.PathLike[str]) -> BaseFiles | Skeleton:
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
        return open_pipeline(path)
    config = os.path.join(path, CONFIG)
    if os.path.exists(config) and not any(name.endswith(".safetensors") for name in os.listdir(path)):
        from graft.files.skeleton import describe_config

        return describe_config(path, read_object(config, finite=False))
    return read_base_files(path)


def open_pipeline(path: str) -> Skeleton:
    """Return the models of a diffusers pipeline as one: the name of its part stands before each tensor's."""
    folders = [part for part in sorted(os.listdir(path)) if part.startswith(COMPONENTS)]
    parts = {part: open_base(os.path.join(path, part)) for part in folders if is_model_folder(os.path.join(path, part))}
    if not any(True for part in parts.values() for _ in part.modules):
        raise CheckpointError(f"{path} holds no models of a pipeline.")
    return join_pipeline_models(path, read_object(os.path.join(path, PIPELINE)), parts)


def is_model_folder(folder: str) -> bool:
    return os.path.exists(os.path.join(folder, CONFIG))


def join_pipeline_models(path: str, config: Json, parts: Mapping[str, BaseDescription]) -> Skeleton:
    """Return the models of a pipeline's parts as one."""
    out = Skeleton(path, config, parts=parts)
    for part, model in parts.items():
        out.shapes |= {f"{part}.{name}": shape for name, shape in model.shapes.items()}
        out.tensors |= {f"{part}.{name}": tensor for name, tensor in model.tensors.items()}
        out.modules += [f"{part}.{name}" for name in model.modules]
    return out


def view_by_model_names(base: BaseDescription) -> Skeleton | None:
    """Return a base of files by the names of its model's parameters, see `graft.files.skeleton`; None: no library
    here knows the model, or the base has its names already."""
    if not base.views:
        if isinstance(base, BaseFiles):
            from graft.files.skeleton import describe_checkpoint

            view = describe_checkpoint(base)
        else:
            parts = {name: view_by_model_names(part) for name, part in base.parts.items()}
            whole = {name: part or base.parts[name] for name, part in parts.items()}
            view = join_pipeline_models(base.path, base.config, whole) if any(parts.values()) else None
        base.views.append(view)
    return base.views[0]


def choose_names(base: BaseDescription, paths: Iterable[str]) -> BaseDescription:
    """Return a base by the names that an adapter has for its modules, or for most of them.

    These are the files' own, those of the model, or either with one prefix more or less: heads stand around models.
    Of a quantized base the model's come first, since its weights are of other shapes than their codes.
    """
    wanted = set(paths)

    def count_missing(known: BaseDescription) -> int:
        return len(wanted.difference(known.modules, known.shapes))

    best = (view_by_model_names(base) if "quantization_config" in base.config else None) or base
    for view in (lambda: base, lambda: view_by_model_names(base)):  # the model is made only if it is needed
        if count_missing(best) and (known := view()) is not None:
            best = min(best, known, shift_prefix(known, wanted), key=count_missing)
    return best


def shift_prefix(base: BaseDescription, wanted: Set[str]) -> BaseDescription:
    """Return a base whose names have the one prefix more or less by which it has most of the wanted modules."""
    wanted_prefix, base_prefix = find_prefix_shift(wanted, {*base.modules, *base.shapes})
    if wanted_prefix == base_prefix:
        return base

    def rename(name: str) -> str:
        return wanted_prefix + name.removeprefix(base_prefix)

    return Skeleton(
        base.path, base.config, {rename(name): shape for name, shape in base.shapes.items()},
        [*map(rename, base.modules)],
        {rename(name): tensor for name, tensor in base.tensors.items()}, shift=(wanted_prefix, base_prefix),
    )  # fmt: skip
