# SPDX-License-Identifier: Apache-2.0
"""Reads of torch.save files and other zip archives that run no code stored in them."""

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
    """Return the object in an open torch.save file, on the CPU, with `weights_only=True`: no pickled code runs.

    Args:
        path: name of the file in errors.

    Raises:
        CheckpointError: it holds other objects than tensors, dicts and lists, is damaged, or would grow when unpacked
            (`check_archive`).
        Warning: torch warned, and the program turns warnings into errors.
    """
    import torch

    try:
        check_archive(f)
        f.seek(0)
        return torch.load(f, map_location="cpu", weights_only=True)
    except UnpicklingError as e:  # torch's text explains how to run the code, so it is left out
        match = re.search(r"WeightsUnpickler error: *\n?(.*?)(\. |\n|$)", str(e))
        at = f" ({match[1].strip()})" if match and match[1].strip() else ""
        raise CheckpointError(
            f"{path} holds other objects than tensors{at}, and nothing of it has been run. "
            "Ask its author for a safetensors file."
        ) from e
    except Warning:  # torch warns, and this program turns warnings into errors
        raise
    except Exception as e:
        raise CheckpointError(
            f"{path} cannot be read as tensors ({e}): it is damaged, or holds other objects. Save or download it again."
        ) from e


def read_weights(path: str | os.PathLike[str], what: str) -> dict[str, Tensor]:
    """Return the tensors of a file by name: of safetensors if the path ends so, else of torch.save.

    All are on the CPU.

    Args:
        what: begins each error, such as "The state".

    Raises:
        CheckpointError: the file is damaged, or holds anything but a dict of tensors.
        FileNotFoundError: there is no such file.
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
    """Return the first `most` bytes of the first file in a zip archive with a name that ends in `end`.

    Return None if no name ends so, or if `f` is no archive or a damaged one. No error is raised: reading the tensors
    reports damage.
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
    """Raise ValueError if the files in a zip archive have more bytes, unpacked, than the archive itself.

    torch does not compress, so only a manipulated file grows. A file that is no zip archive passes.
    """
    if not is_zipfile(file):
        return
    with ZipFile(file) as archive:
        size = sum(info.file_size for info in archive.infolist())
    if size > os.fstat(file.fileno()).st_size:
        raise ValueError(f"it would become {size:,} bytes, more than it has")
