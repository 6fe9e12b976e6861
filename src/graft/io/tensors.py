# SPDX-License-Identifier: Apache-2.0
"""Write tensors as safetensors, into a file that is there already.

What safetensors' own `save_file` writes has its metadata in a random order, and goes through a temporary file that a
process which is killed leaves behind under a name nobody can recognise.
"""

from __future__ import annotations

import ctypes
from functools import cache, partial

import torch
from torch import Tensor, nn

from graft.config.atomic import replace_file
from graft.config.notes import parse_header, write_tensors
from graft.core.errors import CheckpointError
from graft.io.seal import KEY, compute_digest
from graft.storage import standalone


def write_safetensors(path: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors, the widest dtypes first so that all are aligned, and metadata in order."""
    on_cpu = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
    parts = ((k, name_dtype(t.dtype), t.shape, t.element_size(), partial(view_bytes, k, t)) for k, t in on_cpu.items())
    write_tensors(path, parts, metadata)


def copy_to_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return copies on the CPU, which training in another thread leaves alone: a digest must be that of the file."""
    return {key: t.detach().to("cpu", copy=True).contiguous() for key, t in tensors.items()}


def write_sealed(path: str, tensors: dict[str, Tensor]) -> None:
    """Write tensors, all of them in memory, whole or not at all, with their digest."""
    replace_file(path, lambda to: write_safetensors(to, tensors, {"format": "pt", KEY: digest_tensors(tensors)}))


def digest_tensors(tensors: dict[str, Tensor]) -> str:
    """Return the digest of tensors that are plain ones."""
    on_cpu = ((key, t.detach().cpu().contiguous()) for key, t in tensors.items())
    return compute_digest((key, name_dtype(t.dtype), list(t.shape), view_bytes(key, t)) for key, t in on_cpu)


def view_bytes(key: str, t: Tensor) -> bytes | ctypes.Array[ctypes.c_char]:
    """Return the memory of a contiguous tensor on the CPU, as long as that lives."""
    if not t.nbytes:
        return b""
    if not t.data_ptr():  # a subclass that holds its values elsewhere
        raise CheckpointError(f"'{key}' is a {type(t).__name__} without values of its own: pass it dense.")
    memory = (ctypes.c_char * t.nbytes).from_address(t.data_ptr())
    memory.keeps = t  # type: ignore[attr-defined]
    return memory


@cache
def name_dtype(dtype: torch.dtype) -> str:
    """Return what safetensors calls a dtype."""
    from safetensors.torch import save

    return str(parse_header(save({"x": torch.empty(0, dtype=dtype)}))[0]["x"]["dtype"])


Shapes = dict[str, torch.Size]  # of parameters, by name


def find_torn_bias(before: Shapes, after: Shapes) -> tuple[str, torch.Size, torch.Size] | None:
    """Return name and shape of a weight, and the shape of its bias, which counted the same and no longer do."""
    for name, shape in before.items():
        bias = f"{name.removesuffix('weight')}bias"
        if bias in before and before[bias][:1] == shape[:1] and after[bias][:1] != after[name][:1]:
            return name, after[name], after[bias]
    return None


def resize_parameters(module: nn.Module, shapes: Shapes) -> nn.Module:
    """Return a copy of `module` with parameters of other `shapes` (by name), uninitialised."""
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
