# SPDX-License-Identifier: Apache-2.0
"""A folder that holds a whole model where an adapter was looked for."""

from __future__ import annotations

import json
import os

NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
WRAPPED = "base_model."  # how the names of a PeftModel's tensors begin


def whole_model(folder: str | os.PathLike) -> str:
    """Return a note for errors about a missing adapter: what of a whole model is there; '' if nothing."""
    found = next((name for name in NAMES if os.path.isfile(os.path.join(folder, name))), None)
    if found is None:
        return ""
    if not any(key.startswith(WRAPPED) for key in keys_in(os.path.join(folder, found))):
        return f": the folder holds a whole model ({found}), to be loaded by its own class, and no adapter"
    return (
        f": the folder holds a whole model ({found}) with an adapter inside, as transformers' Trainer saves one that "
        "it does not know for a PeftModel. For the adapter, make the model by get_peft_model() as it was trained, "
        "read the file into it by load_state_dict(), and call its save_pretrained(). Before training, call "
        "graft.compat.peft.install(), and checkpoints will hold the adapter alone"
    )


def keys_in(path: str) -> list[str]:
    """Return the names of the tensors in a safetensors file or an index; none if it cannot be read so."""
    try:
        with open(path, "rb") as f:
            if path.endswith(".json"):
                return list(json.load(f)["weight_map"])
            if path.endswith(".safetensors"):
                return list(json.loads(f.read(int.from_bytes(f.read(8), "little"))))
    except (OSError, ValueError, LookupError, TypeError, OverflowError, MemoryError):
        pass
    return []
