# SPDX-License-Identifier: Apache-2.0
"""Files of torch.save and other zip archives, read without running what is in them."""

from __future__ import annotations

import os
import re
from pickle import UnpicklingError
from typing import IO, TYPE_CHECKING
from zipfile import ZipFile, is_zipfile

from graft.config.reading import open_file
from graft.core.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


def load_torch_file(f: IO[bytes], path: str) -> object:
    """Return what a file of torch.save holds, and run nothing that is in it.

    Raises:
        CheckpointError: it holds other objects than tensors, dicts and lists, or is damaged.
    """
    import torch

    try:
        check_archive(f)
        f.seek(0)
        return torch.load(f, map_location="cpu", weights_only=True)
    except UnpicklingError as e:  # whose own text says how to run it
        match = re.search(r"WeightsUnpickler error: *\n?(.*?)(\. |\n|$)", str(e))
        at = f" ({match[1].strip()})" if match and match[1].strip() else ""
        raise CheckpointError(f"{path} holds other objects than tensors, and nothing of it has been run{at}.") from e
    except Warning:  # torch's, of a program whose warnings are errors
        raise
    except Exception as e:
        raise CheckpointError(f"{path} cannot be read as tensors ({e}): it is damaged, or holds other objects.") from e


def read_weights(path: str | os.PathLike[str], what: str) -> dict[str, Tensor]:
    """Return the tensors of a file of safetensors or of torch.save, by name.

    Args:
        what: what the file is, for errors.

    Raises:
        CheckpointError: it is damaged, or holds something else.
        FileNotFoundError: there is none.
    """
    from torch import Tensor

    path = os.fspath(path)
    if not os.path.lexists(path):
        raise FileNotFoundError(f"{what}: there is no file '{path}'.")
    try:
        with open_file(path) as f:
            if path.endswith(".safetensors"):
                from safetensors.torch import load

                tensors: object = load(f.read())
            else:
                tensors = load_torch_file(f, path)
    except Exception as e:  # damaged files raise errors of many types
        raise CheckpointError(f"{what} '{path}' cannot be read as tensors ({e}). Give another file.") from e
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{what} '{path}' does not hold tensors by name. Give another file.")
    return tensors


def read_record(f: IO[bytes], end: str, most: int) -> bytes | None:
    """Return the first `most` bytes of the file in a zip archive whose name ends in `end`.

    None: there is no such file, or no archive, or it is damaged, and reading its tensors tells.
    """
    try:
        with ZipFile(f) as archive:
            name = next((n for n in archive.namelist() if n.endswith(end)), None)
            if name is None:
                return None
            with archive.open(name) as record:
                return record.read(most)
    except Exception:  # zipfile and its decompressors raise errors of many types
        return None


def check_archive(file: IO[bytes]) -> None:
    """Raise ValueError for a torch file that holds more than it has bytes: torch does not compress what it writes."""
    if not is_zipfile(file):
        return
    with ZipFile(file) as archive:
        size = sum(info.file_size for info in archive.infolist())
    if size > os.fstat(file.fileno()).st_size:
        raise ValueError(f"it would become {size:,} bytes, more than it has")
