# SPDX-License-Identifier: Apache-2.0
"""Reading and writing an adapter's files. Writes are atomic and local."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graft.config.atomic import write_all, write_text
from graft.config.base import CONFIG_NAME
from graft.config.hub import fetch
from graft.core.errors import CheckpointError
from graft.io.entries import renamed
from graft.io.fingerprint import KEY
from graft.storage.parallel import is_sharded

SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
WEIGHTS_NAME = "adapter_model.bin"


@dataclass
class Loaded:
    """The content of a weights file."""

    tensors: dict[str, Tensor]
    path: str
    fingerprint: dict | None = None  # the base model's, if graft wrote the file


def save_adapter(folder: str, tensors: dict[str, Tensor], config: Any, safetensors: bool, fingerprint: dict) -> None:
    """Write weights and config; on an error both stay as they were."""
    if spread := [k for k, t in tensors.items() if is_sharded(t)]:
        raise CheckpointError(
            f"'{spread[0]}' is sharded: each process holds a part of it. Gather the whole tensors on all processes (as "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict does) and pass them as save_pretrained(…, "
            "state_dict=…)."
        )
    os.makedirs(folder, exist_ok=True)
    name, other = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME) if safetensors else (WEIGHTS_NAME, SAFETENSORS_WEIGHTS_NAME)

    def write_weights(path: str) -> None:
        if safetensors:
            from safetensors.torch import save_file

            save_file(separate(tensors), path, metadata={"format": "pt", KEY: json.dumps(fingerprint)})
        else:
            torch.save({k: v.detach().cpu() for k, v in tensors.items()}, path)

    files = {name: write_weights, CONFIG_NAME: write_text(config.to_json())}
    stale = os.path.join(folder, other)  # older values under the other format's name
    write_all({os.path.join(folder, f): write for f, write in files.items()}, remove=(stale,))


def separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as safetensors wants them: contiguous, on the CPU, no two on one storage."""
    seen: set[int] = set()
    out = {}
    for key, t in tensors.items():
        t = t.detach().cpu().contiguous()
        storage = t.untyped_storage().data_ptr()
        if storage in seen and t.numel():
            t = t.clone()
        seen.add(storage)
        out[key] = t
    return out


def load_weights(where: str, subfolder: str | None = None, **hub: Any) -> Loaded:
    """Read an adapter's tensors from a folder or hub repository: safetensors if there, else the torch file.

    Raises:
        CheckpointError: there is no weights file, or it is damaged.
    """
    path = fetch(where, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **hub)
    if path is not None:
        return read_safetensors(path)
    path = fetch(where, WEIGHTS_NAME, subfolder=subfolder, **hub)
    if path is None:
        place = os.path.join(where, subfolder) if subfolder else where
        raise CheckpointError(
            f"Can't find weights for {place}: neither {SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME} is there, or on "
            "the hub."
        )
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        raise CheckpointError(f"{path} cannot be read as tensors ({e}): it is damaged, or holds other objects.") from e
    if not isinstance(tensors, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in tensors.items()
    ):
        raise CheckpointError(f"{path} does not hold a dict of tensors by name: it is no adapter's weights file.")
    return Loaded(tensors, path)


def read_safetensors(path: str) -> Loaded:
    """Read a file into memory: if mapped, overwriting it would change a running model, and truncating it would kill
    the process."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        with open(path, "rb") as f:
            data = f.read()
        found = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # `load` does not return it
        tensors = {key: found[key] for key in header if key in found}  # in the file's order, which `load` loses
    except (SafetensorError, OSError, KeyError) as e:  # KeyError: a dtype that torch lacks
        raise CheckpointError(f"{path} is truncated or corrupted ({e}): save or download it again.") from e
    metadata = header.get("__metadata__") or {}
    try:
        stored = json.loads(metadata.get(KEY) or "null")
    except json.JSONDecodeError as e:
        raise CheckpointError(f"{path} has a damaged note on its base model ({e}): save or download it again.") from e
    return Loaded(tensors, path, stored)


def load_peft_weights(
    model_id: str, device: str | None = None, key_mapping: dict[str, str] | None = None, **hub: Any
) -> dict[str, Tensor]:
    """Return an adapter's tensors by file key. `device`: where to put them; the CPU if None."""
    tensors = load_weights(os.fspath(model_id), **hub).tensors
    if device is not None:
        tensors = {k: v.to(device) for k, v in tensors.items()}
    return renamed(tensors, key_mapping)
