# SPDX-License-Identifier: Apache-2.0
"""Base models of an adapter, in every form: a folder of weights, a diffusers pipeline, a config alone, a live model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Set

from graft import CheckpointError
from graft.config.reading import Json, read_object
from graft.files.base import BaseDescription, read_base_files
from graft.files.places import find_prefix_shift

PIPELINE, CONFIG = "model_index.json", "config.json"
# parts of a pipeline that adapters change; text_encoder_2 counts, too
COMPONENTS = ("unet", "transformer", "text_encoder")

# quant_method of a config → format in `budget.FORMATS`
PACKED = {"mxfp4": "mxfp4", "fp8": "fp8", "bitsandbytes": "nf4"}


def read_quantization_format(config: Json) -> str | None:
    """Return the weight format that a model's config names in `quantization_config`: "mxfp4", "fp8", or "nf4" for
    bitsandbytes.

    Returns None for other methods, for bitsandbytes in 8 bits, and for configs without quantization.
    """
    quantization = config.get("quantization_config") or {}
    return None if quantization.get("load_in_8bit") else PACKED.get(str(quantization.get("quant_method")))


def open_base(path: str | os.PathLike[str]) -> BaseDescription:
    """Read the names and shapes of a base model's tensors; values stay unread.

    A folder with model_index.json is a diffusers pipeline: one description of all its models. A folder with config.json
    and no safetensors file is built on the meta device from the config. Every other folder is read as safetensors
    files.

    Args:
        path: the model's folder, or its config.json, which means its folder ("." for a bare name).

    Raises:
        CheckpointError: the folder is none of these, or damaged.
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


def open_pipeline(path: str) -> BaseDescription:
    """Return the models of a diffusers pipeline as one description, with names such as "unet.down_blocks.0".

    Only folders with a config.json that begin with unet, transformer or text_encoder count, each opened by `open_base`.
    Raises CheckpointError if none has modules.
    """
    folders = {part: os.path.join(path, part) for part in sorted(os.listdir(path)) if part.startswith(COMPONENTS)}
    models = {part: folder for part, folder in folders.items() if os.path.exists(os.path.join(folder, CONFIG))}
    parts = {part: open_base(folder) for part, folder in models.items()}
    if not any(part.modules for part in parts.values()):
        raise CheckpointError(f"{path} has no {', '.join(COMPONENTS)} with modules. Give a complete pipeline.")
    return join_pipeline_models(path, read_object(os.path.join(path, PIPELINE)), parts)


def join_pipeline_models(path: str, config: Json, parts: Mapping[str, BaseDescription]) -> BaseDescription:
    """Return one description with the names, shapes and tensors of all parts, each with the prefix "part.".

    `parts` itself is kept in it.
    """
    out = BaseDescription(path, config, parts=parts)
    for part, model in parts.items():
        out.shapes |= {f"{part}.{name}": shape for name, shape in model.shapes.items()}
        out.tensors |= {f"{part}.{name}": tensor for name, tensor in model.tensors.items()}
        out.modules += [f"{part}.{name}" for name in model.modules]
    return out


def view_by_model_names(base: BaseDescription) -> BaseDescription | None:
    """Return a base under the parameter names of its transformers or diffusers model, in place of the file's names.

    Returns None if no installed library knows the model, or the base is neither files nor a pipeline, such as a live
    model. For a pipeline, parts without such a view keep their names; the result is None if no part has one. The result
    is cached in `base.views`.
    """
    if not base.views:
        if base.files:
            from graft.files.skeleton import describe_checkpoint

            view = describe_checkpoint(base)
        else:
            parts = {name: view_by_model_names(part) for name, part in base.parts.items()}
            whole = {name: part or base.parts[name] for name, part in parts.items()}
            view = join_pipeline_models(base.path, base.config, whole) if any(parts.values()) else None
        base.views.append(view)
    return base.views[0]


def choose_names(base: BaseDescription, paths: Iterable[str]) -> BaseDescription:
    """Return the base under the names that an adapter uses: those of the files, or of the model, with one prefix added
    or removed.

    The choice lacks the fewest of `paths`; of equal ones the first counts, without a prefix before with one. A
    quantized base starts with the model's names, since its files hold codes of other shapes. The model is only built if
    a path is missing.
    """
    wanted = set(paths)

    def count_missing(known: BaseDescription) -> int:
        """Return how many of the paths are neither modules nor tensors of a base."""
        return len(wanted.difference(known.modules, known.shapes))

    best = (view_by_model_names(base) if "quantization_config" in base.config else None) or base
    for by_model in (False, True):  # the model is only built if the files lack names
        if count_missing(best) and (known := view_by_model_names(base) if by_model else base) is not None:
            best = min(best, known, shift_prefix(known, wanted), key=count_missing)
    return best


def shift_prefix(base: BaseDescription, wanted: Set[str]) -> BaseDescription:
    """Return the base with one prefix added to or removed from all names, so that it has the most of `wanted`.

    Returns `base` itself if no prefix helps, otherwise a new description with the same config and tensors, without
    files and model, and the prefixes in `shift`.
    """
    wanted_prefix, base_prefix = find_prefix_shift(wanted, {*base.modules, *base.shapes})
    if wanted_prefix == base_prefix:
        return base

    def rename(name: str) -> str:
        """Return a name with the wanted prefix in front, without the base's prefix if it begins with that."""
        return wanted_prefix + name.removeprefix(base_prefix)

    return BaseDescription(
        base.path, base.config, {rename(name): shape for name, shape in base.shapes.items()},
        [*map(rename, base.modules)],
        {rename(name): tensor for name, tensor in base.tensors.items()}, shift=(wanted_prefix, base_prefix),
    )  # fmt: skip
