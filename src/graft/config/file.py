# SPDX-License-Identifier: Apache-2.0
# Supported inside: rooms may import this module.
"""The config of a saved adapter. It exists twice: in adapter_config.json, and as a copy in the weights file.

If the two differ, `choose_fields` decides. adapter_config.json counts if somebody edited it. The copy in the weights
counts if a save has replaced the weights and not yet the config, or was killed between the two. See `pair.py`.
"""

from __future__ import annotations

import os
import time

from graft.config import notes
from graft.config.hub import describe_offline, fetch_file, looks_like_repository
from graft.config.pair import CONFIG_NAME, find_stamp, find_weights, mark_token, read_marks
from graft.config.reading import LARGEST_HEADER, Json, open_file, parse_json, read_object
from graft.core.errors import CheckpointError, PeftWarning, join_some, warn

PATIENCE, PAUSE = 0.2, 0.01  # seconds: a save takes less from the weights to the config
DESCRIBING = {  # fields that do not change the adapter's output
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type",
}  # fmt: skip


class ConfigFile:
    """The adapter_config.json of a folder or hub repository, read before the weights are.

    From the hub it is downloaded.

    `folder` and `path` are local. The attribute for the fields is None if there is no such file, but weights with a
    copy.

    Raises:
        CheckpointError: there is no config, or it cannot be read.
        HubError: the hub cannot be reached, or does not give the file.
    """

    def __init__(self, where: str | os.PathLike[str], subfolder: str | None, **hub: object):
        """Find the config's folder, downloading the file from the hub if `where` is a repository, and read it.

        Raises:
            CheckpointError: there is no adapter_config.json and no copy of it in the weights, or it is damaged.
            HubError: the hub cannot be reached, or does not give the file.
        """
        self.where, self.hub = where, hub
        path = fetch_file(where, CONFIG_NAME, subfolder=subfolder, **hub)
        self.folder = os.path.join(where, subfolder or "") if path is None else os.path.dirname(path)
        self.path = os.path.join(self.folder, CONFIG_NAME)
        self.fields = self._read()
        if self.fields is None and getattr(find_weights(self.folder), "config", None) is None:
            self._require(None)

    def _read(self) -> Json | None:
        """Return the fields in adapter_config.json; None if there is no such file.

        Raises CheckpointError if it is damaged.
        """
        return read_object(self.path) if os.path.isfile(self.path) else None

    def choose_fields(self, weights: notes.WeightsFile | None) -> Json:
        """Return the fields that belong to the weights, which were read after the config.

        Without a copy of the config in the weights (`weights` is None, or graft did not write them) these are the
        fields of adapter_config.json. If the two differ, this function reads again, for up to `PATIENCE` seconds:

        - They agree now, or the folder has other weights by now: the copy.
        - No save is under way and adapter_config.json no longer changes: its fields, since somebody edited them. A
            warning lists the differences.
        - A mark of a save remains: the save was cut short. The copy, with a warning.

        Raises:
            CheckpointError: there is no config, or the copy is no JSON object.
        """
        fields = self.fields
        if weights is None or weights.config is None:
            return self._require(fields)
        where = f"The config that {weights.path} holds"
        inside: Json = parse_json(weights.config, where)
        if not isinstance(inside, dict):
            raise CheckpointError(f"{where} is a {type(inside).__name__}: save or download it again.")
        end = time.monotonic() + PATIENCE
        while fields != inside:
            saving = self._is_marked(weights.stamp)  # asked first: a save takes its mark away when all is done
            before, fields = fields, self._read()
            if find_stamp(os.path.dirname(weights.path)) != weights.stamp:
                return inside  # another save came: its config may be in the folder already
            if not saving and fields == before:
                fields = self._require(fields)
                self._warn_edited(fields, inside)
                return fields
            if time.monotonic() > end:
                self._warn_cut_short(weights.path)
                return inside
            time.sleep(PAUSE)
        return inside

    def _is_marked(self, stamp: notes.Stamp | None) -> bool:
        """Return True if a save is under way or was killed: a mark in the folder names these weights, or the text of
        the adapter_config.json there.
        """
        marks = read_marks(self.folder)
        if not marks or mark_token(stamp) in marks:
            return bool(marks)
        if not os.path.isfile(self.path):
            return False
        with open_file(self.path) as f:
            return mark_token(f.read()) in marks

    def _require(self, fields: Json | None) -> Json:
        """Return `fields`. Raises CheckpointError if they are None, with the contents of the folder that explain it."""
        if fields is None:
            why = describe_whole_model(self.folder) or describe_adapter_folders(self.folder) or self._describe_missing()
            raise CheckpointError(f"Can't find '{CONFIG_NAME}' at '{self.where}'{why}")
        return fields

    def _describe_missing(self) -> str:
        """Return the end of the error for a missing adapter, by the kind of path: a file, a folder without that
        sub-folder, a missing folder; or why the hub was not asked. "" for a folder, or if the hub was asked.
        """
        where = os.fspath(self.where)
        if os.path.isfile(where):
            return ": it is a file, give the folder around it. graft.load_adapter(model, …) reads single files"
        if os.path.isdir(where) and not os.path.isdir(self.folder):
            inner = os.path.relpath(self.folder, where)
            return (
                f": there is no folder {inner!r} in it"
                f"{describe_adapter_folders(where).replace(': it holds', ', which holds', 1)}"
            )
        if os.path.isdir(where) or looks_like_repository(where):
            return describe_offline(where, **self.hub)
        return ": there is no such folder"

    def _warn_edited(self, fields: dict[str, object], inside: dict[str, object]) -> None:
        """Warn of the fields that somebody changed in adapter_config.json since the save.

        Fields in `DESCRIBING` are left out; no warning if none differs.
        """
        # a save writes all fields of a config: of others, `PeftConfig.from_known_fields` warns
        names = [n for n in find_differing_fields(fields, inside) if n in inside]
        if names:
            differ = ", ".join(f"{n} ({fields.get(n)!r}, saved with {inside.get(n)!r})" for n in names)
            warn(
                f"{self.path} was edited since its weights were saved: {differ}. The edited values count.", PeftWarning
            )

    def _warn_cut_short(self, weights: str) -> None:
        """Warn that a save was cut short, so that adapter_config.json belongs to another adapter than the weights."""
        warn(
            f"A save was cut short: {self.path} belongs to another adapter than {weights}, so the config inside the "
            "weights is used. Save the adapter again: other libraries would combine the two.",
            PeftWarning,
        )


def find_differing_fields(a: Json, b: Json) -> list[str]:
    """Return the names of the fields with different values in two configs, sorted; those in `DESCRIBING` left out."""
    names = sorted({*a, *b} - DESCRIBING)
    return [n for n in names if normalize_value(a.get(n)) != normalize_value(b.get(n))]


def normalize_value(value: object) -> object:
    """Return a field's value for a comparison: a list of texts sorted, and None for a value that is empty or false."""
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        value = sorted(value)
    return value or None


NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
WRAPPED = "base_model."  # how the names of a PeftModel's tensors begin


def describe_whole_model(folder: str | os.PathLike[str]) -> str:
    """Return the end of the error for a missing adapter if the folder holds a whole model; "" if it does not.

    If the model's tensors have names of a PeftModel, the text says how to get the adapter out.
    """
    name = next((name for name in NAMES if os.path.isfile(os.path.join(folder, name))), None)
    if name is None:
        return ""
    if not any(key.startswith(WRAPPED) for key in read_tensor_names(os.path.join(folder, name))):
        return f": the folder holds a whole model ({name}), to be loaded by its own class, and no adapter"
    return (
        f": the folder holds a whole model ({name}) with an adapter inside, as transformers' Trainer saves one that "
        "it does not know for a PeftModel. For the adapter, make the model by get_peft_model() as it was trained, "
        "read the file into it by load_state_dict(), and call its save_pretrained(). Before training, call "
        "graft.compat.peft.install(), and checkpoints will hold the adapter alone"
    )


def describe_adapter_folders(folder: str | os.PathLike[str]) -> str:
    """Return the end of the error for a missing adapter if sub-folders hold adapters, with their names; "" if none
    does.
    """
    folders = find_adapter_folders(folder)
    return (
        f": it holds adapters in the folders {join_some(folders)}, give one of them, or subfolder=" if folders else ""
    )


def find_adapter_folders(folder: str | os.PathLike[str]) -> list[str]:
    """Return the names, in quotes and sorted, of the sub-folders that hold an adapter_config.json; [] if there is no
    folder.
    """
    inner = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return [repr(name) for name in inner if os.path.isfile(os.path.join(folder, name, CONFIG_NAME))]


def read_tensor_names(path: str) -> list[str]:
    """Return the names of the tensors in a safetensors file, from its header, or in a JSON index, from its
    "weight_map".

    Return [] for files with another ending, and for a file that is missing or damaged.
    """
    try:
        if path.endswith(".json"):
            return list(read_object(path, LARGEST_HEADER)["weight_map"])
        if path.endswith(".safetensors"):
            with open_file(path) as f:
                return list(parse_json(f.read(min(int.from_bytes(f.read(8), "little"), LARGEST_HEADER)), path))
    except (OSError, CheckpointError, LookupError, TypeError):
        pass
    return []
