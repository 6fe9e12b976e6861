# SPDX-License-Identifier: Apache-2.0
# Supported inside: rooms may import this module.
"""The two files of an adapter, which change together: the weights, and adapter_config.json.

The weights hold the text of the config as well. So a save happens at one moment: the rename of the new weights.
adapter_config.json, which other libraries read and people edit, is replaced afterwards.

Until both are in place the folder has a mark: an empty file with a name made of hashes of the new weights' stamp and
the new config. By the mark a reader knows that a save will still replace the config, or that another save put it there.
A config that differs without a mark was edited by somebody.

No lock is taken: network file systems may have none, and a stopped process would stop all others. If several processes
save into one folder, the last to finish makes the two files agree.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

from graft.config import notes, seal
from graft.config.atomic import TEMPORARY, Scratch, Write, find_abandoned, make_folder, sync_file
from graft.core.errors import CheckpointError

CONFIG_NAME = "adapter_config.json"
SAFETENSORS, TORCH = "adapter_model.safetensors", "adapter_model.bin"  # readers take the first that is there
MARK = "saving-"
ROUNDS = 100


def save_pair(folder: str, name: str, write: Write, text: str, beside: dict[str, bytes] | None = None) -> None:
    """Replace an adapter in a folder: its weights, then its config and further files.

    All are written and synced first.

    A call that fails leaves the old files. One that is killed leaves the old adapter or the new one, and `ConfigFile`
    recognises the latter by its mark. Temporary files of processes that no longer run are deleted.

    Args:
        name: of the weights file. An older file of the other format (safetensors or torch) is deleted.
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


def save_sealed(folder: str, tensors: Sequence[notes.Source], text: str, texts: Mapping[str, str]) -> None:
    """Replace an adapter in a folder, made if needed, by safetensors with a digest, and its config (`save_pair`).

    Args:
        tensors: as of `notes.write_tensors`. Each is loaded twice, one after another.
        text: of adapter_config.json.
        texts: further notes of the weights file.
    """
    digest = seal.compute_digest((name, dtype, shape, load) for name, dtype, shape, _, load in tensors)
    texts = {**texts, "format": "pt", notes.CONFIG: text, seal.KEY: digest}
    with make_folder(folder):
        save_pair(folder, SAFETENSORS, lambda path: notes.write_tensors(path, tensors, texts), text)


def check_sealed(texts: Mapping[str, str], tensors: Sequence[notes.Source], path: str) -> None:
    """Raise CheckpointError if the notes `texts` of a weights file have a digest, and its tensors have another."""
    if (saved := texts.get(seal.KEY)) is not None:
        digest = seal.compute_digest((name, dtype, shape, load) for name, dtype, shape, _, load in tensors)
        seal.check_digest(saved, digest, path)


def agree_on_config(scratch: Scratch, text: str) -> None:
    """Write the config that the weights hold, until both agree: another process may have replaced the weights since.

    `text` is the config that this process wrote. Gives up after `ROUNDS` rounds.
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

    None if there are none.
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
    """Put the old weights back after a failed save, by their second names. If there were none, delete the new ones.

    Weights that another process has written since stay.

    Args:
        weights, stale: paths of the new weights, and of the other format.
        new_stamp: of the weights that this save wrote.
        old: stamps of both paths before the save; None where no file was.
        links: second names of the old files.

    Raises:
        OSError: an old file has no second name, or cannot be renamed.
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

    Empty: no save is under way or was killed.
    """
    with os.scandir(folder) as entries:
        names = [match["of"] for entry in entries if (match := TEMPORARY.fullmatch(entry.name))]
    return {part for name in names if name.startswith(MARK) for part in name.removeprefix(MARK).split("-")}


def mark_name(stamp: notes.Stamp | None, text: str) -> str:
    """Return the name of the mark for weights with this stamp and a config with this text."""
    return f"{MARK}{mark_token(stamp)}-{mark_token(text)}"


def mark_token(of: object) -> str:
    """Return 16 hex digits, a hash: of bytes as they are, of another object's `str()`."""
    import hashlib

    return hashlib.sha256(of if isinstance(of, bytes) else str(of).encode()).hexdigest()[:16]
