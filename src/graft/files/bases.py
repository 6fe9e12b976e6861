# SPDX-License-Identifier: Apache-2.0
"""Base models in the forms in which people have them: folders of weights, of a pipeline, a config, a live model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Set
from typing import TYPE_CHECKING

from graft import CheckpointError
from graft.config.reading import Json, read_object
from graft.files.base import BaseFiles, Known, Skeleton, base_files
from graft.files.places import shift_of

if TYPE_CHECKING:
    pass

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
        from graft.files.skeleton import from_config

        return from_config(path, read_object(config, finite=False))
    return base_files(path)


def pipeline(path: str) -> Skeleton:
    """Return the models of a diffusers pipeline as one: the name of its part stands before each tensor's."""
    folders = [part for part in sorted(os.listdir(path)) if part.startswith(COMPONENTS)]
    parts = {part: base_of(os.path.join(path, part)) for part in folders if is_model(os.path.join(path, part))}
    if not any(True for part in parts.values() for _ in part.modules):
        raise CheckpointError(f"{path} holds no models of a pipeline.")
    return together(path, read_object(os.path.join(path, PIPELINE)), parts)


def is_model(folder: str) -> bool:
    return os.path.exists(os.path.join(folder, CONFIG))


def together(path: str, config: Json, parts: Mapping[str, Known]) -> Skeleton:
    """Return the models of a pipeline's parts as one."""
    out = Skeleton(path, config, parts=parts)
    for part, model in parts.items():
        out.shapes |= {f"{part}.{name}": shape for name, shape in model.shapes.items()}
        out.tensors |= {f"{part}.{name}": tensor for name, tensor in model.tensors.items()}
        out.modules += [f"{part}.{name}" for name in model.modules]
    return out


def by_model(base: Known) -> Skeleton | None:
    """Return a base of files by the names of its model's parameters, see `graft.files.skeleton`; None: no library
    here knows the model, or the base has its names already."""
    if not base.views:
        if isinstance(base, BaseFiles):
            from graft.files.skeleton import of_files

            made = of_files(base)
        else:
            parts = {name: by_model(part) for name, part in base.parts.items()}
            whole = {name: part or base.parts[name] for name, part in parts.items()}
            made = together(base.path, base.config, whole) if any(parts.values()) else None
        base.views.append(made)
    return base.views[0]


def fitted(base: Known, paths: Iterable[str]) -> Known:
    """Return a base by the names that an adapter has for its modules, or for most of them.

    These are the files' own, those of the model, or either with one prefix more or less: heads stand around models.
    Of a quantized base the model's come first, since its weights are of other shapes than their codes.
    """
    wanted = set(paths)

    def lacks(known: Known) -> int:
        return len(wanted.difference(known.modules, known.shapes))

    best = (by_model(base) if "quantization_config" in base.config else None) or base
    for view in (lambda: base, lambda: by_model(base)):  # the model is made only if it is needed
        if lacks(best) and (known := view()) is not None:
            best = min(best, known, shifted(known, wanted), key=lacks)
    return best


def shifted(base: Known, wanted: Set[str]) -> Known:
    """Return a base whose names have the one prefix more or less by which it has most of the wanted modules."""
    here, there = shift_of(wanted, {*base.modules, *base.shapes})
    if here == there:
        return base

    def new(name: str) -> str:
        return here + name.removeprefix(there)

    return Skeleton(
        base.path, base.config, {new(name): shape for name, shape in base.shapes.items()}, [*map(new, base.modules)],
        {new(name): tensor for name, tensor in base.tensors.items()}, shift=(here, there),
    )  # fmt: skip
