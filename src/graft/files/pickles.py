# SPDX-License-Identifier: Apache-2.0
"""Files of torch.save, read without running what is in them."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from graft import CheckpointError
from graft.config.archives import load_torch_file, read_record
from graft.config.atomic import replace_file
from graft.config.reading import open_file
from graft.files.tensors import Tensor, read_header

if TYPE_CHECKING:
    import torch

LOOKED_AT = 2**22  # bytes of a pickle, in which names are looked for


def read_torch(path: str) -> object:
    """Return what a file of torch.save holds: torch's own tensors, in dicts and lists.

    Raises:
        CheckpointError: it holds anything else, such as code, or is damaged.
    """
    with open_file(path) as f:
        return load_torch_file(f, path)


def read_tensors(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a file of safetensors or of torch.save, and the metadata that the first kind has.

    Raises:
        CheckpointError: it is damaged, or holds something else.
    """
    if path.endswith(".safetensors"):
        return read_header(path)
    content = read_torch(path)
    return convert_tensors(content.get("state_dict", content) if isinstance(content, dict) else content, path), {}


def write_torch(path: str, content: object) -> None:
    """Write a file of torch.save, which appears whole.

    Raises:
        OSError: the disk is full, say.
    """
    import torch

    def save(temporary: str) -> None:
        try:
            with open(temporary, "wb") as f:  # given a path, torch 2.6 says nothing of a full disk
                torch.save(content, f)
        except RuntimeError as e:  # its writer of archives knows no other
            raise OSError(errno.EIO, f"it could not be written, perhaps because the disk is full ({e})", path) from None

    replace_file(path, save)


def convert_tensors(state: object, path: str) -> dict[str, Tensor]:
    """Return a dict of torch's tensors as those of files.

    Raises:
        CheckpointError: it is no such dict, or one of them is no plain tensor of real numbers.
    """
    from graft.io.files import check_tensors_by_name

    return {key: from_torch(t, f"'{key}' in {path}") for key, t in check_tensors_by_name(state, path).items()}


def from_torch(t: torch.Tensor, what: str) -> Tensor:
    """Return one of torch's tensors as that of a file.

    Raises:
        CheckpointError: it is no plain tensor of real numbers.
    """
    from graft.files.merging.weights import NAMES, to_file
    from graft.io.check import describe_fault

    if (why := describe_fault(t)) is not None or t.dtype not in NAMES:
        raise CheckpointError(f"{what} {why or f'has dtype {t.dtype}'}: adapters are plain tensors of real numbers.")
    return to_file(t.cpu())


def to_torch(t: Tensor) -> torch.Tensor:
    """Return a tensor of a file as torch's own, of the same dtype."""
    from graft.files.merging.weights import of_file

    return of_file(t).clone()


def mentions_name(path: str | os.PathLike[str], *names: bytes) -> bool:
    """Return True if one of `names` stands in the pickle of a file of torch.save: a look, without torch."""
    with open_file(path) as f:
        text = read_record(f, "data.pkl", LOOKED_AT) or b""
    return any(name in text for name in names)
