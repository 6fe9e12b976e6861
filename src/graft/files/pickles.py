# SPDX-License-Identifier: Apache-2.0
"""Files of torch.save, read without running what is in them."""

from __future__ import annotations

import errno
import os
import pickle
import zipfile
from typing import TYPE_CHECKING

from graft.config.atomic import replace
from graft.core.errors import CheckpointError
from graft.files.tensors import NUMPY, Tensor

if TYPE_CHECKING:
    import torch

LOOKED_AT = 2**22  # bytes of a pickle, in which names are looked for


def read_torch(path: str | os.PathLike[str]) -> object:
    """Return what a file of torch.save holds: torch's own tensors, in dicts and lists.

    Raises:
        CheckpointError: it holds anything else, such as code, or is damaged.
    """
    import torch

    from graft.io.files import not_run

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise CheckpointError(f"{path} holds other objects than tensors, {not_run(e)}.") from None
    except Exception as e:
        raise CheckpointError(f"{path} is damaged, or no file of torch.save: {e}") from None


def write_torch(path: str, content: object) -> None:
    """Write a file of torch.save, which appears whole.

    Raises:
        OSError: the disk is full, say.
    """
    import torch

    def save(temporary: str) -> None:
        try:
            torch.save(content, temporary)
        except RuntimeError as e:  # its writer of archives knows no other
            raise OSError(errno.EIO, f"it could not be written, perhaps because the disk is full ({e})", path) from None

    replace(path, save)


def tensors_of(state: object, path: str) -> dict[str, Tensor]:
    """Return a dict of torch's tensors as those of files.

    Raises:
        CheckpointError: it is no such dict.
    """
    import torch

    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(t, torch.Tensor) for key, t in state.items()
    ):
        raise CheckpointError(f"{path} does not hold a dict of tensors by name.")
    return {key: from_torch(t, f"'{key}' in {path}") for key, t in state.items()}


def from_torch(t: torch.Tensor, what: str) -> Tensor:
    import torch

    t = t.detach().cpu().contiguous()
    if t.layout is not torch.strided or t.is_quantized or t.is_complex():
        raise CheckpointError(f"{what} is no plain tensor of real numbers.")
    if t.dtype == torch.bfloat16:
        return Tensor(tuple(t.shape), "BF16", lambda: t.view(torch.int16).numpy().tobytes())
    values = t.numpy()
    name = next((name for name, form in NUMPY.items() if form.lstrip("<") == values.dtype.str.lstrip("<|")), None)
    if name is None:
        raise CheckpointError(f"{what} has dtype {t.dtype}, which no adapter has.")
    return Tensor(tuple(t.shape), name, values.tobytes)


def to_torch(t: Tensor) -> torch.Tensor:
    """Return a tensor of a file as torch's own, of the same dtype."""
    import torch

    if t.dtype == "BF16":
        return torch.frombuffer(bytearray(t.load()), dtype=torch.int16).view(torch.bfloat16).reshape(t.shape).clone()
    import numpy as np

    values = np.frombuffer(t.load(), NUMPY[t.dtype]).reshape(t.shape)
    return torch.from_numpy(values.copy())


def mentions(path: str | os.PathLike[str], *names: bytes) -> bool:
    """Return True if one of `names` stands in the pickle of a file of torch.save: a look, without torch."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
            with archive.open(name) as f:
                text = f.read(LOOKED_AT)
    except (OSError, zipfile.BadZipFile, StopIteration, RuntimeError, NotImplementedError):
        return False
    return any(name in text for name in names)
