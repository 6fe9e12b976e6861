# SPDX-License-Identifier: Apache-2.0
"""The config of a saved adapter, of which there are two copies: adapter_config.json, and one in the weights' file.

They differ where somebody edited adapter_config.json, which counts, and where a save has replaced the weights and not
yet the config, or was cut short between the two: then the copy in the weights counts. See `pair.py`.
"""

from __future__ import annotations

import os
import time

from graft.config import notes
from graft.config.hub import fetch, looks_like_repository, not_asked
from graft.config.pair import CONFIG_NAME, found_in, marked, stamp_in, token
from graft.config.reading import Json, open_file, parsed, read_object
from graft.core.errors import CheckpointError, PeftWarning, some, warn

PATIENCE, PAUSE = 0.2, 0.01  # seconds: a save takes less from the weights to the config
DESCRIBING = {  # fields that say nothing of what an adapter computes
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type",
}  # fmt: skip


class ConfigFile:
    """The adapter_config.json of a folder or hub repository, read before the weights are.

    Raises:
        CheckpointError: there is no config, or it cannot be read.
    """

    def __init__(self, where: str | os.PathLike[str], subfolder: str | None, **hub: object):
        self.where, self.hub = where, hub
        path = fetch(where, CONFIG_NAME, subfolder=subfolder, **hub)
        self.folder = os.path.join(where, subfolder or "") if path is None else os.path.dirname(path)
        self.path = os.path.join(self.folder, CONFIG_NAME)
        self.beside = self._now()
        if self.beside is None and getattr(found_in(self.folder), "config", None) is None:
            self._needed(None)

    def _now(self) -> Json | None:
        return read_object(self.path) if os.path.isfile(self.path) else None

    def of(self, weights: notes.Noted | None) -> Json:
        """Return the fields that belong to weights which were read since."""
        beside = self.beside
        if weights is None or weights.config is None:
            return self._needed(beside)
        where = f"The config that {weights.path} holds"
        inside: Json = parsed(weights.config, where)
        if not isinstance(inside, dict):
            raise CheckpointError(f"{where} is a {type(inside).__name__}: save or download it again.")
        end = time.monotonic() + PATIENCE
        while beside != inside:
            saving = self._is_marked(weights.stamp)  # asked first: a save takes its mark away when all is done
            before, beside = beside, self._now()
            if stamp_in(os.path.dirname(weights.path)) != weights.stamp:
                return inside  # another save came: its config may be beside already
            if not saving and beside == before:
                beside = self._needed(beside)
                self._say_edited(beside, inside)
                return beside
            if time.monotonic() > end:
                self._say_cut_short(weights.path)
                return inside
            time.sleep(PAUSE)
        return inside

    def _is_marked(self, stamp: notes.Stamp | None) -> bool:
        """Return True if a save, under way or cut short, has brought these weights or what is beside them."""
        marks = marked(self.folder)
        if not marks or token(stamp) in marks:
            return bool(marks)
        if not os.path.isfile(self.path):
            return False
        with open_file(self.path) as f:
            return token(f.read()) in marks

    def _needed(self, fields: Json | None) -> Json:
        if fields is None:
            why = whole_model(self.folder) or adapters_in(self.folder) or self._not_there()
            raise CheckpointError(f"Can't find '{CONFIG_NAME}' at '{self.where}'{why}")
        return fields

    def _not_there(self) -> str:
        """Return a note for errors about a missing adapter: what its place is instead of a folder; '' if it is one."""
        where = os.fspath(self.where)
        if os.path.isfile(where):
            return ": it is a file, give the folder around it. graft.load_adapter(model, …) reads single files"
        if os.path.isdir(where) and not os.path.isdir(self.folder):
            inner = os.path.relpath(self.folder, where)
            return f": there is no folder {inner!r} in it{adapters_in(where).replace(': it holds', ', which holds', 1)}"
        if os.path.isdir(where) or looks_like_repository(where):
            return not_asked(where, **self.hub)
        return ": there is no such folder"

    def _say_edited(self, beside: dict[str, object], inside: dict[str, object]) -> None:
        # a save writes all fields of a config: of others, `PeftConfig.tolerant` warns
        names = [n for n in sorted(set(inside) - DESCRIBING) if plain(beside.get(n)) != plain(inside[n])]
        if names:
            differ = ", ".join(f"{n} ({beside.get(n)!r}, saved with {inside.get(n)!r})" for n in names)
            warn(
                f"{self.path} is not the config that the weights beside it were saved with: {differ}. It counts, as "
                "edited since.",
                PeftWarning,
            )

    def _say_cut_short(self, weights: str) -> None:
        warn(
            f"A save was cut short: {self.path} belongs to another adapter than {weights}, whose own config is used. "
            "Other libraries would take the two together: save the adapter again.",
            PeftWarning,
        )


def plain(value: object) -> object:
    """Return a value as it counts: the order of a list of names means nothing, nor does one that is empty."""
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        value = sorted(value)
    return value or None


NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
WRAPPED = "base_model."  # how the names of a PeftModel's tensors begin


def whole_model(folder: str | os.PathLike[str]) -> str:
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


def adapters_in(folder: str | os.PathLike[str]) -> str:
    """Return a note for errors about a missing adapter: which folders in this one hold one; '' if none does."""
    found = holders(folder)
    return f": it holds adapters in the folders {some(found)}, give one of them, or subfolder=" if found else ""


def holders(folder: str | os.PathLike[str]) -> list[str]:
    """Return the names, in quotes, of the folders in this one that hold an adapter."""
    inner = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return [repr(name) for name in inner if os.path.isfile(os.path.join(folder, name, CONFIG_NAME))]


def keys_in(path: str) -> list[str]:
    """Return the names of the tensors in a safetensors file or an index; none if it cannot be read so."""
    try:
        if path.endswith(".json"):
            return list(read_object(path, notes.LARGEST)["weight_map"])
        if path.endswith(".safetensors"):
            with open_file(path) as f:
                return list(parsed(f.read(min(int.from_bytes(f.read(8), "little"), notes.LARGEST)), path))
    except (OSError, CheckpointError, LookupError, TypeError):
        pass
    return []
