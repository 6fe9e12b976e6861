# SPDX-License-Identifier: Apache-2.0
"""Write tensors as safetensors, into a file that exists already.

The `save_file` of safetensors writes metadata in a random order. It also uses a temporary file; a killed process leaves
that under a name nobody can recognise.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graft.config.atomic import write_pieces
from graft.config.notes import make_header, parse_header
from graft.config.seal import compute_digest
from graft.core.errors import CheckpointError
from graft.storage.fsdp2 import standalone


class PackedTensors(NamedTuple):
    """Copies of tensors on the CPU, in the order of a safetensors file: the widest numbers first, so that all are
    aligned, then by name. Tensors of one dtype that follow one another are in one memory.
    """

    parts: list[tuple[str, str, torch.Size, int, memoryview]]  # name, dtype, shape, bytes of a number, its memory
    memories: list[memoryview]  # one after the other they are the file without its header

    @classmethod
    def copy(cls, tensors: Mapping[str, Tensor]) -> PackedTensors:
        """Return copies of all tensors on the CPU, joined to blocks of memory of one dtype.

        Later steps of training do not change them.

        Tensors are sorted by the width of their numbers, the widest first, then by key; each run of one dtype is a
        block.
        """
        packed = cls([], [])
        order = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
        for dtype, group in groupby(order, key=lambda item: item[1].dtype):
            named = list(group)
            with torch.no_grad():
                joined = torch.cat([flatten_on_cpu(key, t) for key, t in named])
            array: Any = joined.view(torch.uint8).numpy()
            memory, end = memoryview(array), 0
            packed.memories.append(memory)
            width, name = joined.element_size(), name_dtype(dtype)
            for key, t in named:
                begin, end = end, end + t.numel() * width
                packed.parts.append((key, name, t.shape, width, memory[begin:end]))
        return packed

    def digest(self) -> str:
        """Return `compute_digest` of the parts' names, dtypes, shapes and bytes."""
        return compute_digest((name, dtype, shape, memory) for name, dtype, shape, _, memory in self.parts)


def flatten_on_cpu(key: str, t: Tensor) -> Tensor:
    """Return a plain tensor of one dimension on the CPU; it may share the memory of t.

    Raises:
        CheckpointError: a tensor subclass that holds its values elsewhere.
    """
    if type(t) in (Tensor, nn.Parameter):
        return t.cpu().reshape(-1)
    data = view_bytes(key, t.detach().cpu().contiguous())
    return torch.frombuffer(data, dtype=t.dtype) if len(data) else torch.empty(0, dtype=t.dtype)


def write_safetensors(path: str, tensors: Mapping[str, Tensor] | PackedTensors, metadata: dict[str, str]) -> None:
    """Write tensors and metadata to `path`, with metadata in a fixed order. The file is overwritten in place."""
    packed = tensors if isinstance(tensors, PackedTensors) else PackedTensors.copy(tensors)
    write_pieces(path, [make_header(packed.parts, metadata), *packed.memories])


def copy_to_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return detached, contiguous copies on the CPU, also of tensors that are there already.

    Training in another thread does not change them, so that a digest is that of the file.
    """
    return {key: t.detach().to("cpu", copy=True).contiguous() for key, t in tensors.items()}


def digest_tensors(tensors: dict[str, Tensor] | PackedTensors) -> str:
    """Return the digest of plain tensors, on any device, from their keys, dtypes, shapes and bytes.

    Packed tensors compute it from their memory.
    """
    if isinstance(tensors, PackedTensors):
        return tensors.digest()
    on_cpu = ((key, t.detach().cpu().contiguous()) for key, t in tensors.items())
    return compute_digest((key, name_dtype(t.dtype), list(t.shape), view_bytes(key, t)) for key, t in on_cpu)


def view_bytes(key: str, t: Tensor) -> bytes | ctypes.Array[ctypes.c_char]:
    """Return the memory of a contiguous CPU tensor as bytes, without a copy; it keeps the tensor alive.

    b"" for an empty one.

    Raises:
        CheckpointError: `data_ptr()` is 0, as for a tensor subclass that holds its values elsewhere. A RuntimeError of
            `data_ptr()` itself is not converted.
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
    """Return safetensors' name of a dtype, such as "BF16". Cached. A dtype that safetensors lacks raises its error."""
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
    shapes.

    They have the old dtype and device, and require gradients. A new weight also sets `out_features` or `num_embeddings`
    of its module to its rows.
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
