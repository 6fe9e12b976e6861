# SPDX-License-Identifier: Apache-2.0
"""Write tensors as safetensors, into a file that exists already.

The `save_file` of safetensors writes metadata in a random order. It also uses a temporary file; a killed process leaves
that under a name nobody can recognise.
"""

from __future__ import annotations

import ctypes
from functools import cache, partial

import torch
from torch import Tensor, nn

from graft.config.notes import parse_header, write_tensors
from graft.config.seal import compute_digest
from graft.core.errors import CheckpointError
from graft.storage import standalone


def write_safetensors(path: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and metadata to `path`: the widest dtypes first, so that all are aligned, and metadata in a fixed
    order. The file is overwritten in place.
    """
    on_cpu = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
    parts = ((k, name_dtype(t.dtype), t.shape, t.element_size(), partial(view_bytes, k, t)) for k, t in on_cpu.items())
    write_tensors(path, parts, metadata)


def copy_to_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous copies on the CPU.

    Training in another thread does not change them, so that a digest is that of the file.
    """
    return {key: t.detach().to("cpu", copy=True).contiguous() for key, t in tensors.items()}


def digest_tensors(tensors: dict[str, Tensor]) -> str:
    """Return the digest of plain tensors, on any device."""
    on_cpu = ((key, t.detach().cpu().contiguous()) for key, t in tensors.items())
    return compute_digest((key, name_dtype(t.dtype), list(t.shape), view_bytes(key, t)) for key, t in on_cpu)


def view_bytes(key: str, t: Tensor) -> bytes | ctypes.Array[ctypes.c_char]:
    """Return the memory of a contiguous CPU tensor as bytes, without a copy; it keeps the tensor alive.

    Raises:
        CheckpointError: a tensor subclass that holds its values elsewhere.
    """
    if not t.nbytes:
        return b""
    if not t.data_ptr():  # a subclass that holds its values elsewhere
        raise CheckpointError(f"'{key}' is a {type(t).__name__} that holds its values elsewhere. Pass it dense.")
    memory = (ctypes.c_char * t.nbytes).from_address(t.data_ptr())
    memory.keeps = t  # type: ignore[attr-defined]
    return memory


@cache
def name_dtype(dtype: torch.dtype) -> str:
    """Return safetensors' name of a dtype, such as "BF16"."""
    from safetensors.torch import save

    return str(parse_header(save({"x": torch.empty(0, dtype=dtype)}))[0]["x"]["dtype"])


Shapes = dict[str, torch.Size]  # of parameters, by name


def find_torn_bias(before: Shapes, after: Shapes) -> tuple[str, torch.Size, torch.Size] | None:
    """Return the first weight with as many rows as its bias before but not after: (name, new shape, new shape of the
    bias). None if there is none.
    """
    for name, shape in before.items():
        bias = f"{name.removesuffix('weight')}bias"
        if bias in before and before[bias][:1] == shape[:1] and after[bias][:1] != after[name][:1]:
            return name, after[name], after[bias]
    return None


def resize_parameters(module: nn.Module, shapes: Shapes) -> nn.Module:
    """Return a standalone copy of `module` with the parameters in `shapes` replaced by uninitialized ones of these
    shapes. Sets `out_features` or `num_embeddings` of their modules.
    """
    copy = standalone(module)
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        owner = copy.get_submodule(path)
        old = getattr(owner, leaf)
        setattr(owner, leaf, nn.Parameter(old.data.new_empty(shape)))
        for attribute in ("out_features", "num_embeddings"):
            if leaf == "weight" and hasattr(owner, attribute):
                setattr(owner, attribute, shape[0])
    return copy
