# SPDX-License-Identifier: Apache-2.0
"""Files of torch.save, read without running code from them."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from graft.config.atomic import replace_file
from graft.config.reading import check_tensors_by_name, describe_fault, load_torch_file, open_file, read_record
from graft.files.errors import make_damage_error
from graft.files.tensors import Tensor, read_header

if TYPE_CHECKING:
    import torch

LOOKED_AT = 2**22  # the bytes of a pickle that are searched for names


def read_torch(path: str) -> object:
    """Return the content of a torch.save file: torch tensors, in dicts and lists.

    Raises:
        CheckpointError: the file holds anything else, such as code, or is damaged.
    """
    with open_file(path) as f:
        return load_torch_file(f, path)


def read_tensors(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a file.

    It is safetensors by its ending, otherwise torch.save without metadata.

    A dict with "state_dict" in it is unpacked.

    Raises:
        CheckpointError: the file is damaged, or holds anything but tensors.
    """
    if path.endswith(".safetensors"):
        return read_header(path)
    content = read_torch(path)
    return convert_tensors(content.get("state_dict", content) if isinstance(content, dict) else content, path), {}


def write_torch(path: str, content: object) -> None:
    """Write a torch.save file, which appears whole or not at all.

    Raises:
        OSError: the write failed, for example on a full disk.
    """
    import torch

    def save(temporary: str) -> None:
        """Write the content to the temporary path. torch's RuntimeError becomes OSError."""
        try:
            with open(temporary, "wb") as f:  # with a path, torch 2.6 ignores a full disk
                torch.save(content, f)
        except RuntimeError as e:  # torch's archive writer raises nothing else
            raise OSError(errno.EIO, f"it could not be written, perhaps because the disk is full ({e})", path) from None

    replace_file(path, save)


def convert_tensors(state: object, path: str) -> dict[str, Tensor]:
    """Return a dict of torch tensors as Tensor objects by name.

    Raises:
        CheckpointError: `state` is no such dict, or a tensor is no plain tensor of real numbers.
    """
    return {key: from_torch(t, f"'{key}' in {path}") for key, t in check_tensors_by_name(state, path).items()}


def from_torch(t: torch.Tensor, what: str) -> Tensor:
    """Return a torch tensor as a Tensor. One on the CPU shares its memory; others are copied there.

    Raises:
        CheckpointError: it is no plain tensor of real numbers, or its dtype has no name in files. The text begins with
            `what`.
    """
    from graft.files.merging.weights import NAMES, to_file

    if (why := describe_fault(t)) is not None or t.dtype not in NAMES:
        raise make_damage_error(f"{what} {why or f'has dtype {t.dtype}'}: adapters are plain tensors of real numbers")
    return to_file(t.cpu())


def to_torch(t: Tensor) -> torch.Tensor:
    """Return a Tensor as a new torch tensor of the same dtype."""
    from graft.files.merging.weights import of_file

    return of_file(t).clone()


def mentions_name(path: str | os.PathLike[str], *names: bytes) -> bool:
    """Return True if one of `names` occurs in the first 4 MiB of a torch.save file's pickle (data.pkl); False without
    such a record.

    Does not unpickle.
    """
    with open_file(path) as f:
        text = read_record(f, "data.pkl", LOOKED_AT) or b""
    return any(name in text for name in names)
