# SPDX-License-Identifier: Apache-2.0
"""A base model as files: its config, and the names and shapes of its tensors from the headers of its shards."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from graft.config.reading import Json, read_object
from graft.core.errors import CheckpointError
from graft.files.tensors import Tensor, read_header

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass
class BaseFiles:
    """A folder with a model in safetensors files.

    Attributes:
        config: of config.json.
        tensors: the checkpoint's own names → tensors, none of which is read yet.
        files: the checkpoint's own names → file that holds it, relative to the folder.
    """

    path: str
    config: Json = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def modules(self) -> Iterable[str]:
        return dict.fromkeys(name.rpartition(".")[0] for name in self.tensors)


def base_files(path: str | os.PathLike[str]) -> BaseFiles:
    """Look at a model's folder: config.json and the headers of its safetensors files.

    Raises:
        CheckpointError: there is no such folder, no safetensors file in it, or one is damaged or not there.
    """
    path = os.fspath(path)
    if not os.path.isdir(path):
        raise CheckpointError(f"{path} is no folder with a model.")
    config = os.path.join(path, "config.json")
    base = BaseFiles(path, read_object(config) if os.path.exists(config) else {})
    for name in shards(path):
        where = os.path.join(path, name)
        if not os.path.exists(where):
            raise CheckpointError(f"{where} is not there, though {INDEX} names it.")
        for key, tensor in read_header(where)[0].items():
            if key in base.tensors:
                raise CheckpointError(f"'{key}' stands in two files of {path}: {base.files[key]} and {name}.")
            base.tensors[key], base.files[key] = tensor, name
    return base


def shards(path: str) -> list[str]:
    """Return the names of a model's safetensors files: those of its index; without one, all that are there.

    A model.safetensors that the index does not name is all of the model.
    """
    index = os.path.join(path, INDEX)
    whole = os.path.exists(os.path.join(path, WHOLE))
    if os.path.exists(index):
        try:
            with open(index, encoding="utf-8") as f:
                names = sorted(set(json.load(f)["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise CheckpointError(f"{index} is damaged: {e!r}") from None
        if strange := [n for n in names if not isinstance(n, str) or os.path.basename(n) != n]:
            raise CheckpointError(f"{index} names files outside its folder: {strange[:3]}.")
        return [WHOLE] if whole and WHOLE not in names else names  # as transformers, which looks for it first
    found = sorted(n for n in os.listdir(path) if n.endswith(".safetensors") and not n.startswith(("adapter_", ".")))
    if not found:
        raise CheckpointError(f"{path} holds no safetensors files of a model.")
    return found
