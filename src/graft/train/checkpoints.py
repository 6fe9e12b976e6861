# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of a Trainer: which of them is whole."""

from __future__ import annotations

import os
import re
from zipfile import is_zipfile

from graft import CheckpointError
from graft.config.notes import LARGEST
from graft.config.reading import open_file, parsed
from graft.files.tensors import read_header
from graft.train.resuming import load

NAME = re.compile(r"checkpoint-(\d{1,18})")
STATE = "trainer_state.json"  # Trainer writes it last
ARCHIVES = (".pt", ".pth", ".bin")


def last_checkpoint(folder: str | os.PathLike[str], by_name: bool = True) -> str | None:
    """Return the newest whole checkpoint in the output folder of a Trainer; None if there is none.

    transformers' `get_last_checkpoint` returns the one of the largest number, also if a process was killed while it
    was saved. This reads all files of tensors: headers of safetensors and archives, and of graft's own the digest.

    Args:
        by_name: the checkpoint has the training.safetensors that `graft.train.Resumable` writes. False: Trainer resumes
            by its own files.
    """
    found = {int(m[1]): m[0] for name in os.listdir(folder) if (m := NAME.fullmatch(name))}
    for step in sorted(found, reverse=True):
        path = os.path.join(folder, found[step])
        if is_whole(path, step, by_name):
            return path
    return None


def is_whole(path: str, step: int, by_name: bool) -> bool:
    """Return True if Trainer's state in a checkpoint is of a step, and each file of tensors has all its bytes."""
    try:
        with open_file(os.path.join(path, STATE)) as f:
            state = parsed(f.read(LARGEST), STATE)  # its losses may be NaN
        if not isinstance(state, dict) or state.get("global_step") != step:
            return False
        for name in os.listdir(path):
            where = os.path.join(path, name)
            if name.endswith(".safetensors"):
                read_header(where)
            elif name.endswith(ARCHIVES):
                with open_file(where) as f:
                    if not is_zipfile(f):
                        return False
        return not by_name or load(path)[0]["step"] == step
    except (CheckpointError, OSError):
        return False
