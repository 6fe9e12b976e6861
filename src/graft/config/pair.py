# SPDX-License-Identifier: Apache-2.0
# Supported inside: rooms may import this module.
"""The two files of an adapter, which change together: the weights, and adapter_config.json.

The weights hold the text of the config as well. So a save happens at one moment: the rename of the new weights.
adapter_config.json, which other libraries read and people edit, is replaced afterwards.

Until both are in place the folder has a mark: an empty file with a name made of hashes of the new weights' stamp and
the new config. By the mark a reader knows that a save will still replace the config, or that another save put it there.
A config that differs without a mark was edited by somebody: `ConfigFile.choose_fields` decides.

No lock is taken: network file systems may have none, and a stopped process would stop all others. If several processes
save into one folder, the last to finish makes the two files agree.

`StackLayout` is the layout of expert stacks in the weights, as far as the config says it.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from graft.config import notes, seal
from graft.config.atomic import CHUNK, TEMPORARY, Scratch, Write, find_abandoned, make_folder, reserve_blocks, sync_file
from graft.config.hub import describe_offline, fetch_file, looks_like_repository
from graft.config.notes import make_header
from graft.config.reading import LARGEST_HEADER, Json, open_file, parse_json, read_object
from graft.core.errors import CheckpointError, ConfigError, PeftWarning, join_some, warn

FORMAT_VERSION = "0.21.2"  # files are those of this release of PEFT
CONFIG_NAME = "adapter_config.json"
SAFETENSORS, TORCH = "adapter_model.safetensors", "adapter_model.bin"  # readers take the first that is there
MARK = "saving-"
ROUNDS = 100
BUFFER = CHUNK // 2  # bytes: many tensors are small; a larger buffer would copy chunks
PATIENCE, PAUSE = 0.2, 0.01  # seconds: a save takes less from the weights to the config
DESCRIBING = {  # fields that do not change the adapter's output
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type",
}  # fmt: skip
See = Callable[[Any], object]  # is passed bytes
Source = tuple[str, str, Sequence[int], int, Callable[[], Any]]  # name, dtype, shape, bytes of a number, memory


class AdapterInMemory(NamedTuple):
    """The config and the tensors of an adapter in memory, by PEFT's names, passed instead of a folder.

    `path` names it in errors.
    """

    config: Any  # a PeftConfig
    tensors: dict[str, Any]
    path: str


def save_pair(folder: str, name: str, write: Write, text: str, beside: dict[str, bytes] | None = None) -> None:
    """Replace an adapter in a folder: its weights, then its config and further files.

    All are written to temporary files and synced first. A mark in the folder names the new weights and config
    meanwhile.

    A call that fails leaves the old files. One that is killed leaves the old adapter or the new one, and `ConfigFile`
    recognises the latter by its mark. Temporary files and marks of processes that no longer run are deleted. If an
    error comes after both files are in place, the new ones stay, with the mark, and the error continues.

    Args:
        name: of the weights file. An older file of the other format (safetensors or torch) is deleted, unless another
            process has replaced it meanwhile.
        write: writes the weights, which hold `text` as well.
        text: of adapter_config.json.
        beside: further files, {name: bytes}.

    Raises:
        CheckpointError: the weights are new, the config is old, and neither could be changed.
        OSError: writing failed, and the old files are back.
    """
    left = find_abandoned(folder)
    if left:
        remove_files(path for path, of in left.items() if not of.startswith(MARK))
    weights, config = os.path.join(folder, name), os.path.join(folder, CONFIG_NAME)
    stale = os.path.join(folder, TORCH if name == SAFETENSORS else SAFETENSORS)
    old = {path: notes.read_stamp(path) for path in (stale, weights)}
    with Scratch(folder) as scratch:
        new = scratch.write(name, write)
        new_config = scratch.write(CONFIG_NAME, text)
        more = {scratch.write(of, data): of for of, data in (beside or {}).items()}
        links = {path: scratch.add_link(path) for path in old}
        new_stamp = notes.read_stamp(new)
        scratch.create(mark_name(new_stamp, text))
        try:
            os.replace(new, weights)
            if old[stale] is not None and notes.read_stamp(stale) == old[stale]:  # else another process's new one
                with suppress(FileNotFoundError):  # another process was quicker
                    os.remove(stale)
            os.replace(new_config, config)
            for path, of in more.items():
                os.replace(path, os.path.join(folder, of))
            agree_on_config(scratch, text)
            sync_file(folder)
        except BaseException as e:
            if os.path.lexists(new):
                raise  # nothing has changed
            if not os.path.lexists(new_config):  # both are in place
                scratch.spare(MARK)
                raise
            try:
                restore_weights(weights, stale, new_stamp, old, links)
            except OSError:
                scratch.spare(MARK)
                raise CheckpointError(
                    f"{weights} is saved, and graft loads it, but {config} is still the old one ({e}). Save again: "
                    "other libraries would combine the two."
                ) from e
            raise
    if left:
        remove_files(path for path, of in left.items() if of.startswith(MARK))


def save_sealed(folder: str, tensors: Sequence[Source], text: str, texts: Mapping[str, str]) -> None:
    """Replace an adapter in a folder, made if needed, by safetensors with a digest, and its config (`save_pair`).

    Args:
        tensors: as of `write_tensors`. Each is loaded twice, one after another.
        text: of adapter_config.json.
        texts: further notes of the weights file. "format", the config's text and the digest are added, and override
            such keys.
    """
    digest = seal.compute_digest((name, dtype, shape, load) for name, dtype, shape, _, load in tensors)
    texts = {**texts, "format": "pt", notes.CONFIG: text, seal.KEY: digest}
    with make_folder(folder):
        save_pair(folder, SAFETENSORS, lambda path: write_tensors(path, tensors, texts), text)


def check_sealed(texts: Mapping[str, str], tensors: Sequence[Source], path: str) -> None:
    """Raise CheckpointError if the notes `texts` of a weights file have a digest, and its tensors have another."""
    if (saved := texts.get(seal.KEY)) is not None:
        digest = seal.compute_digest((name, dtype, shape, load) for name, dtype, shape, _, load in tensors)
        seal.check_digest(saved, digest, path)


def write_tensors(path: str, tensors: Iterable[Source], notes: Mapping[str, str], see: See = len) -> None:
    """Write a safetensors file: the notes sorted by name, then the tensors.

    Wide numbers come first, so that all are aligned; tensors of one width are sorted by name.

    Each tensor is loaded when it is written, `CHUNK` bytes at a time, and dropped afterwards. The blocks of the whole
    file are reserved first (`reserve_blocks`).

    Args:
        tensors: (name, dtype, shape, bytes of a number, function that returns the bytes) of each.
        see: is passed the bytes of the file, piece by piece.
    """
    order = sorted(tensors, key=lambda source: (-source[3], source[0]))
    header = make_header(order, notes)
    with open(path, "wb", BUFFER) as f:
        reserve_blocks(f.fileno(), len(header) + sum(math.prod(shape) * width for _, _, shape, width, _ in order))
        for load in (lambda: header, *(source[-1] for source in order)):
            data = memoryview(load())
            for start in range(0, len(data), CHUNK):
                f.write(data[start : start + CHUNK])
            see(data)
            del data  # before the next one comes


def agree_on_config(scratch: Scratch, text: str) -> None:
    """Write the config that the weights in the folder hold, until both agree: another process may have replaced the
    weights since. Each round marks the weights and config first, and replaces adapter_config.json.

    `text` is the config that this process wrote. Without weights, or if they hold no config or `text`, nothing is
    written. Gives up silently after 100 rounds.
    """
    for _ in range(ROUNDS):
        weights = find_weights(scratch.folder)
        if weights is None or weights.config is None or weights.config == text:
            return
        text = weights.config
        scratch.create(mark_name(weights.stamp, text))
        os.replace(scratch.write(CONFIG_NAME, text), os.path.join(scratch.folder, CONFIG_NAME))


def find_weights(folder: str) -> notes.WeightsFile | None:
    """Return path, config and stamp of the weights that a reader of this folder takes: safetensors, else torch.

    None if there are none. A file that cannot be read counts as absent.
    """
    files = (notes.read_notes(os.path.join(folder, name)) for name in (SAFETENSORS, TORCH))
    return next((weights for weights in files if weights is not None), None)


def find_stamp(folder: str) -> notes.Stamp | None:
    """Return the stamp of the weights that a reader of this folder takes: safetensors, else torch.

    None if there are none.
    """
    stamps = (notes.read_stamp(os.path.join(folder, name)) for name in (SAFETENSORS, TORCH))
    return next((stamp for stamp in stamps if stamp is not None), None)


def restore_weights(
    weights: str,
    stale: str,
    new_stamp: notes.Stamp | None,
    old: dict[str, notes.Stamp | None],
    links: dict[str, str | None],
) -> None:
    """Put the old weights back after a failed save, by their second names.

    If there were none, delete the new ones. The other format's old file comes back only if nothing has its path.

    Weights that another process has written since stay.

    Args:
        weights, stale: paths of the new weights, and of the other format.
        new_stamp: of the weights that this save wrote.
        old: stamps of both paths before the save; None where no file was.
        links: second names of the old files.

    Raises:
        OSError: an old file has no second name (then nothing was changed), or cannot be renamed.
    """
    if any(old[path] is not None and links[path] is None for path in old):
        raise OSError("the old weights have no second name")
    if (link := links[stale]) and not os.path.lexists(stale):
        os.replace(link, stale)
    if notes.read_stamp(weights) == new_stamp:
        if link := links[weights]:
            os.replace(link, weights)
        else:
            os.remove(weights)


def remove_files(paths: Iterable[str]) -> None:
    """Delete files; those that cannot be deleted stay, without an error."""
    for path in paths:
        with suppress(OSError):
            os.remove(path)


# marks


def read_marks(folder: str) -> set[str]:
    """Return the tokens of weights and configs in the names of all marks in a folder.

    Empty: no save is under way or was killed. Raises OSError if the folder cannot be read.
    """
    with os.scandir(folder) as entries:
        names = [match["of"] for entry in entries if (match := TEMPORARY.fullmatch(entry.name))]
    return {part for name in names if name.startswith(MARK) for part in name.removeprefix(MARK).split("-")}


def mark_name(stamp: notes.Stamp | None, text: str) -> str:
    """Return "saving-<hash>-<hash>", the name of the mark for weights with this stamp and a config with this text
    (`mark_token` of each).
    """
    return f"{MARK}{mark_token(stamp)}-{mark_token(text)}"


def mark_token(of: object) -> str:
    """Return the first 16 hex digits of a SHA-256 hash: of bytes as they are, of another object's `str()`."""
    import hashlib

    return hashlib.sha256(of if isinstance(of, bytes) else str(of).encode()).hexdigest()[:16]


def fetch_adapter(repo: str, revision: str | None, *more: str) -> str:
    """Return the folder of an adapter that is downloaded from the hub: config, weights (safetensors, else torch), and
    those of the files `more` that it has.

    Raises:
        CheckpointError: there is no config, or there are no weights.
        HubError: the hub cannot be reached, or does not give a file.
    """
    hub = {"revision": revision} if revision else {}
    config = fetch_file(repo, CONFIG_NAME, **hub)
    if config is None or all(fetch_file(repo, name, **hub) is None for name in (SAFETENSORS, TORCH)):
        source = f"{repo}@{revision}" if revision else repo
        raise CheckpointError(f"There is no adapter at '{source}'{describe_offline(repo)}. Check the name.")
    for name in more:
        fetch_file(repo, name, **hub)
    return os.path.dirname(config)


# the config: adapter_config.json, and its copy in the weights


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
        fields of adapter_config.json. If the two differ, this function reads again every 0.01 s, for up to 0.2 s:

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
        the adapter_config.json there. False without any mark. With a mark of something else, the config file is read,
        if it exists.
        """
        marks = read_marks(self.folder)
        if not marks or mark_token(stamp) in marks:
            return bool(marks)
        if not os.path.isfile(self.path):
            return False
        with open_file(self.path) as f:
            return mark_token(f.read()) in marks

    def _require(self, fields: Json | None) -> Json:
        """Return `fields`.

        Raises CheckpointError if they are None, with the contents of the folder that explain it: a whole model,
        adapters in sub-folders, else the kind of path.
        """
        if fields is None:
            why = describe_whole_model(self.folder) or describe_adapter_folders(self.folder) or self._describe_missing()
            raise CheckpointError(f"Can't find '{CONFIG_NAME}' at '{self.where}'{why}")
        return fields

    def _describe_missing(self) -> str:
        """Return the end of the error for a missing adapter, by the kind of path.

        - A file: it says so.
        - A folder without the sub-folder: names it, and the folders with adapters there.
        - A folder, or a text like "owner/name": why the hub was not asked, "" if it was.
        - Else: there is no such folder.
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
        """Warn (PeftWarning) of the fields that somebody changed in adapter_config.json since the save, with both
        values. The edited values count.

        Fields in `DESCRIBING`, such as `task_type` and `peft_version`, and fields that the save did not write are left
        out; no warning if none differs.
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
    """Return the names of the fields with different values in two configs, sorted.

    A missing field counts as None; values are compared as `normalize_value` returns them. Fields in `DESCRIBING`, such
    as `task_type`, are left out.
    """
    names = sorted({*a, *b} - DESCRIBING)
    return [n for n in names if normalize_value(a.get(n)) != normalize_value(b.get(n))]


def normalize_value(value: object) -> object:
    """Return a field's value for a comparison: a list of texts sorted, and None for a value that is empty, 0 or False.

    Any other value is returned unchanged.
    """
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        value = sorted(value)
    return value or None


NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
WRAPPED = "base_model."  # how the names of a PeftModel's tensors begin


def describe_whole_model(folder: str | os.PathLike[str]) -> str:
    """Return the end of the error for a missing adapter if the folder holds a whole model (model.safetensors,
    pytorch_model.bin or an index); "" if it does not.

    If a tensor's name in the safetensors file or index begins with "base_model.", the text says how to get the adapter
    out.
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
                header = parse_json(f.read(min(int.from_bytes(f.read(8), "little"), LARGEST_HEADER)), path)
            return [name for name in header if name != "__metadata__"]
    except (OSError, CheckpointError, LookupError, TypeError):
        pass
    return []


# the layout of expert stacks' factors in a file, as far as its config says it

LAYOUT_FIELD = "lora_B_layout"  # Unsloth's, in configs: one of the last two names below
TRAINING_ONLY = ("lora_velora_", "lora_monteclora_")  # prefixes of tensors that act in training only
STACK_LAYOUTS: dict[str, Json] = {
    "peft": dict(exchanged=False, by_expert=False),
    "exchanged": dict(exchanged=True),
    "rank_major": dict(by_expert=False),
    "grouped_by_expert": dict(by_expert=True),
}


@dataclass(frozen=True)
class StackLayout:
    """The facts about how a file holds the factors of stacks, before its shapes are seen. None: not known."""

    version: str | None = FORMAT_VERSION  # of the PEFT that wrote it
    exchanged: bool | None = None  # A and B of square stacks are exchanged
    by_expert: bool | None = False  # columns of B: those of an expert are next to each other
    left_to: str | None = None  # the code that replaced PeftModel.load_adapter, and may reorder the columns of B itself

    @classmethod
    def from_config(cls, fields: Json) -> StackLayout:
        """Return the layout that the fields of a file's config say: `peft_version` (None if missing), and Unsloth's
        mark for the columns of B, "lora_B_layout".

        `by_expert` is True for the mark "grouped_by_expert" and False for the other known one. Without a known mark it
        is None for a file of Unsloth ("unsloth_fixed" in `auto_mapping`), otherwise False. Whether A and B are
        exchanged stays open (None).
        """
        version, mark, mapping = fields.get("peft_version"), fields.get(LAYOUT_FIELD), fields.get("auto_mapping")
        unsloth = isinstance(mapping, dict) and mapping.get("unsloth_fixed", False)
        by_expert = mark == "grouped_by_expert" if mark in STACK_LAYOUTS else None if unsloth else False
        return cls(version, by_expert=by_expert)

    def for_replacement(self, replacement: str) -> StackLayout:
        """Return this layout for a load that `replacement` does instead of PEFT.

        Columns by expert become an open question, as the replacement may put them in order itself.
        """
        return replace(self, left_to=replacement, by_expert=None if self.by_expert else self.by_expert)

    def with_names(self, names: str | Collection[str]) -> StackLayout:
        """Return this layout with the caller's `expert_layout`: one name or several; later ones win.

        "exchanged" and "grouped_by_expert" set `exchanged` and `by_expert` to True, "rank_major" sets `by_expert` to
        False, and "peft" both to False.

        Raises:
            ConfigError: there is no layout of such a name.
        """
        out = self
        for name in [names] if isinstance(names, str) else names:
            if name not in STACK_LAYOUTS:
                raise ConfigError(f"expert_layout={names!r}: '{name}' is none of {', '.join(STACK_LAYOUTS)}.")
            out = replace(out, **STACK_LAYOUTS[name])
        return out

    def find_exchanges(
        self, stacks: Mapping[str, tuple[bool | None, bool]], doubts: set[str]
    ) -> dict[str, tuple[bool, bool]]:
        """Return {stack: (exchanged, by_version)}: whether A and B of a stack are exchanged in a file, and whether only
        PEFT's version says so.

        The stack's shape decides first, for a square stack this layout. Then the shapes of other stacks in modules of
        the same orientation decide, if they agree; last PEFT's version.

        Args:
            stacks: {stack: (verdict of its shapes, None if square; whether its module holds (in, out))}.
            doubts: gets "exchanged" if nothing tells.
        """
        by_shape = {kind: {s for s, t in stacks.values() if s is not None and t == kind} for kind in (False, True)}
        verdicts = {}
        for key, (shape, transposed) in stacks.items():
            exchanged, by_version = self.exchanged if shape is None else shape, False
            if exchanged is None and len(by_shape[transposed]) == 1:
                (exchanged,) = by_shape[transposed]
            if exchanged is None:
                exchanged, by_version = decide_exchange(self.version, transposed)
                doubts |= set() if by_version else {"exchanged"}
            verdicts[key] = exchanged, by_version
        return verdicts

    def warn_of_doubts(self, doubts: set[str], file: str) -> None:
        """Give one PeftWarning for each of the `doubts` "exchanged", "twice" and "by_expert", which names the
        `expert_layout` option that settles it.

        Each text begins with `file`, a clause that names adapter and file. Texts differ with the version of
        PEFT and with a package that replaced `load_adapter`.
        """
        factors = "exchanged, as PEFT before 0.18 wrote them" if self.version is None else "as PEFT 0.19.1 writes them"
        columns, remedy = "they were read as PEFT writes them", ", 'rank_major' if a later one did."
        if self.left_to is not None:
            columns = f"that is left to {self.left_to}, which has replaced PeftModel.load_adapter"
            remedy = " and that leaves it alone."
        texts = {
            "exchanged": f"{file} has square stacks of experts, and does not tell whether A and B are exchanged: they "
            f"were read {factors}. Pass expert_layout='exchanged' if PEFT before 0.19.1 trained it, 'peft' if a later "
            "one did.",
            "twice": f"{file}: expert_layout='grouped_by_expert' has put the columns of B in order. "
            f"PeftModel.load_adapter was replaced by {self.left_to}: if that does so as well, leave expert_layout out.",
            "by_expert": f"{file} was trained by Unsloth and does not tell the order of the columns of B of stacks of "
            f"experts: {columns}. Pass expert_layout='grouped_by_expert' if Unsloth before September 2026 trained it"
            + remedy,
        }
        for text in [text for doubt, text in texts.items() if doubt in doubts]:
            warn(text, PeftWarning)


TODAY = StackLayout()


def decide_exchange(version: str | None, transposed: bool) -> tuple[bool, bool]:
    """Return (exchanged, sure): whether a PEFT of this version wrote A of a stack as B and B as A, and whether that is
    sure.

    Without a version the result is (True, False), and (False, True) if `transposed`. 0.19.0 exchanged all stacks,
    earlier versions those that are not transposed, 0.19.1 and later none. Development versions above 0.18.0 up to
    0.19.1, and unreadable ones, give (False, False).

    Args:
        version: None: the file names none, as before 0.18.
        transposed: the module says that it holds its matrices as (in, out).
    """
    if version is None:
        return not transposed, transposed
    numbers = re.match(r"(\d+)\.(\d+)\.?(\d*)", version)
    if numbers is None:
        return False, False
    release = int(numbers[1]), int(numbers[2]), int(numbers[3] or 0)
    if ".dev" in version and (0, 18, 0) < release <= (0, 19, 1):  # the changes came between releases
        return False, False
    return release < (0, 19, 1) and (release >= (0, 19, 0) or not transposed), True
