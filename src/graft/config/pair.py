# SPDX-License-Identifier: Apache-2.0
"""The two files of an adapter, which change together: the weights, and adapter_config.json.

The weights hold the text of the config as well. So there is one moment at which a save happens: when the new weights
get their name. adapter_config.json, which other libraries read and people edit, follows. While it does, a mark stands
in the folder: an empty file whose name says of which weights and of which config. By it a reader tells a config that a
save has yet to replace, or that another save put beside these weights, from one that somebody edited.

No lock is taken, since network file systems may not have them, and a process that is stopped would stop all others.
Several processes may save into one folder: the last to finish sees to it that the two files agree.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress

from graft.config import notes
from graft.config.atomic import TEMPORARY, Scratch, Write, find_abandoned, sync_file
from graft.core.errors import CheckpointError

CONFIG_NAME = "adapter_config.json"
SAFETENSORS, TORCH = "adapter_model.safetensors", "adapter_model.bin"  # readers take the first that is there
MARK = "saving-"
ROUNDS = 100


def save_pair(folder: str, name: str, write: Write, text: str, beside: dict[str, bytes] | None = None) -> None:
    """Replace an adapter in a folder: its weights, which `write` writes and which hold `text`, and its config.

    A call that fails leaves the old files. One that is cut short leaves the old adapter or the new one.

    Args:
        name: of the weights' file. One of the other format, which would be stale, goes.
        text: of adapter_config.json.
        beside: further files, by name.
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
            if old[stale] is not None and notes.read_stamp(stale) == old[stale]:  # and not another process's new one
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
                    f"{weights} is saved, and graft loads it, but {config} is still the old one ({e}): other libraries "
                    "would take the two together. Save again."
                ) from e
            raise
    if left:
        remove_files(path for path, of in left.items() if of.startswith(MARK))


def agree_on_config(scratch: Scratch, text: str) -> None:
    """Make the config that of the weights: another process may have put its own there since `text` was written."""
    for _ in range(ROUNDS):
        weights = find_weights(scratch.folder)
        if weights is None or weights.config is None or weights.config == text:
            return
        text = weights.config
        scratch.create(mark_name(weights.stamp, text))
        os.replace(scratch.write(CONFIG_NAME, text), os.path.join(scratch.folder, CONFIG_NAME))


def find_weights(folder: str) -> notes.WeightsFile | None:
    """Return the weights that a reader of this folder takes; None if there are none."""
    files = (notes.read_notes(os.path.join(folder, name)) for name in (SAFETENSORS, TORCH))
    return next((weights for weights in files if weights is not None), None)


def find_stamp(folder: str) -> notes.Stamp | None:
    """Return the stamp of the weights that a reader of this folder takes."""
    stamps = (notes.read_stamp(os.path.join(folder, name)) for name in (SAFETENSORS, TORCH))
    return next((stamp for stamp in stamps if stamp is not None), None)


def restore_weights(
    weights: str,
    stale: str,
    new_stamp: notes.Stamp | None,
    old: dict[str, notes.Stamp | None],
    links: dict[str, str | None],
) -> None:
    """Undo what a save has done to the weights, unless another process has put its own there since.

    Raises:
        OSError: there are no hard links to the old ones, or they cannot be renamed.
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
    for path in paths:
        with suppress(OSError):
            os.remove(path)


# marks


def read_marks(folder: str) -> set[str]:
    """Return the tokens of weights and configs that the marks in a folder name."""
    with os.scandir(folder) as entries:
        names = [match["of"] for entry in entries if (match := TEMPORARY.fullmatch(entry.name))]
    return {part for name in names if name.startswith(MARK) for part in name.removeprefix(MARK).split("-")}


def mark_name(stamp: notes.Stamp | None, text: str) -> str:
    return f"{MARK}{mark_token(stamp)}-{mark_token(text)}"


def mark_token(of: object) -> str:
    """Return what stands in a mark for a stamp of weights, or for the text of a config."""
    import hashlib

    return hashlib.sha256(of if isinstance(of, bytes) else str(of).encode()).hexdigest()[:16]
