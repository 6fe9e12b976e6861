# SPDX-License-Identifier: Apache-2.0
"""One adapter from those that the stages of a pipeline have saved, each with the layers that it has."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graft.core.errors import CheckpointError
from graft.io.files import load_pair, save_adapter
from graft.io.fingerprint import joined


def join_stages(
    folders: Sequence[str | os.PathLike], folder: str | os.PathLike, safe_serialization: bool = True
) -> None:
    """Write into `folder` the adapter that the stages of a pipeline saved in `folders`, in their order.

    Call it on one process, once all have saved. The file is the one that a single process would have saved.

    Raises:
        CheckpointError: the parts do not belong together, or one is missing or damaged.
    """
    if not folders:
        raise CheckpointError("There are no parts to join: name the folder of each stage, the first one first.")
    pairs = [load_pair(os.fspath(part)) for part in folders]
    tensors: dict[str, Tensor] = {}
    for part, (_, loaded) in zip(folders, pairs):
        for key, t in loaded.tensors.items():
            if key in tensors and not torch.equal(tensors[key], t):
                raise CheckpointError(
                    f"'{key}' has other values in {os.fspath(part)} than in a part before it: the parts are of other "
                    "adapters, or of other moments in training."
                )
            tensors[key] = t
    config = pairs[0][0]
    for part, (other, _) in zip(folders[1:], pairs[1:]):
        join_config(config, other, os.fspath(part))
    notes = [loaded.fingerprint or {} for _, loaded in pairs]
    save_adapter(os.fspath(folder), tensors, config, safe_serialization, joined(notes))


def join_config(config: Any, other: Any, part: str) -> None:
    """Take over what another stage's config says of its own layers."""
    ours, theirs = config.saved_dict(), other.saved_dict()
    if type(config) is not type(other):
        raise CheckpointError(f"{part} holds a {type(other).__name__}, and a part before it a {type(config).__name__}.")
    for name in ours:
        a, b = getattr(config, name), getattr(other, name)
        if ours[name] == theirs[name]:
            continue
        if name == "target_modules" and isinstance(a, (set, list)) and isinstance(b, (set, list)):
            setattr(config, name, set(a) | set(b))
        elif name in config.results and isinstance(a or {}, dict) and isinstance(b or {}, dict):
            setattr(config, name, {**(a or {}), **(b or {})})
        else:
            raise CheckpointError(f"{part} has {name}={theirs[name]!r} in its config, a part before it {ours[name]!r}.")
