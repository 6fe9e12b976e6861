# SPDX-License-Identifier: Apache-2.0
"""Tensors in files, read on demand, and safetensors files of them. numpy only, no torch."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import IO, TYPE_CHECKING

from graft import CheckpointError
from graft.config.atomic import replace_file as put_in_place
from graft.config.pair import write_tensors
from graft.config.reading import LARGEST_HEADER, Json, open_file, parse_json
from graft.core.errors import shorten_text
from graft.files.errors import make_damage_error, make_misfit_error

if TYPE_CHECKING:
    import numpy as np

BITS = {  # safetensors' dtype name → bits per element
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip
NUMPY = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip
POINTER = b"version "  # the beginning of a pointer that git-lfs puts in the place of a file
EIGHT_BITS = ("F8_E4M3", "F8_E5M2", "F8_E8M0")
FLOATS = ("F64", "F32", "F16", "BF16", *EIGHT_BITS)
Bytes = bytes | memoryview
MOST_DIMENSIONS = 64  # as in numpy


@dataclass(frozen=True)
class Tensor:
    """A tensor with a known shape and dtype. Its values are loaded at each read.

    Attributes:
        shape: as in the file.
        dtype: in safetensors' names: "F32", "BF16".
        load: returns the bytes, little-endian and contiguous.
    """

    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], Bytes]

    @property
    def nbytes(self) -> int:
        """The size of the values in bytes: the product of the shape times the bits of the dtype, divided by 8 and
        rounded down.
        """
        return prod(self.shape) * BITS[self.dtype] // 8

    def read(self) -> np.ndarray:
        """Load the values as a numpy array in the tensor's shape: float64, float32, integers and booleans unchanged,
        other floats as float32. The values are read from the file at each call, and arrays that are not converted
        cannot be written to.
        """
        import numpy as np

        data = self.load()
        if self.dtype == "BF16":
            wide = np.frombuffer(data, "<u2").astype("<u4") << 16
            return wide.view("<f4").reshape(self.shape)
        if self.dtype not in NUMPY:
            return list_float8_values(self.dtype)[np.frombuffer(data, "u1")].reshape(self.shape)
        values = np.frombuffer(data, NUMPY[self.dtype]).reshape(self.shape)
        return values.astype("<f4") if self.dtype == "F16" else values

    def reshape(self, *shape: int) -> Tensor:
        """Return the same tensor with another shape. The number of elements is not checked."""
        return replace(self, shape=shape)

    def transpose(self) -> Tensor:
        """Return the tensor with its axes in reverse order, on each load."""
        return self.rearrange(lambda values: values.T, *self.shape[::-1])

    def rearrange(self, change: Callable[[np.ndarray], np.ndarray], *shape: int) -> Tensor:
        """Return a tensor that applies `change` to the values on each load.

        `change` sees the bits as unsigned integers, so it may only move or pad them.

        Args:
            shape: the shape that `change` returns.
        """

        def load() -> bytes:
            """Load the source, apply `change` to its values as a numpy array of unsigned integers of the dtype's width,
            and return the bytes of the result.
            """
            import numpy as np

            return change(np.frombuffer(self.load(), f"u{BITS[self.dtype] // 8}").reshape(self.shape)).tobytes()

        return Tensor(shape, self.dtype, load)


def list_float8_values(dtype: str) -> np.ndarray:
    """Return the values of all 256 codes of an 8-bit float dtype, as float32, with NaN.

    F8_E5M2 and F8_E8M0 have their own rules; any other dtype is read as F8_E4M3 without infinities.
    """
    import numpy as np

    codes = np.arange(256)
    if dtype == "F8_E5M2":  # the upper byte of a float16
        return (codes.astype("<u2") << 8).view("<f2").astype("f4")
    if dtype == "F8_E8M0":
        return np.where(codes == 255, np.nan, np.exp2(codes - 127.0)).astype("f4")
    exponent, fraction = codes >> 3 & 15, (codes & 7) / 8
    values = np.exp2(np.maximum(exponent, 1) - 7.0) * (fraction + (exponent > 0))
    return np.where(codes & 127 == 127, np.nan, np.where(codes > 127, -values, values)).astype("f4")


def dtype_for_writing(dtype: str) -> str:
    """Return the dtype for new values of a tensor: "BF16" for 8-bit floats, otherwise the same dtype."""
    return "BF16" if dtype in EIGHT_BITS else dtype


def make_tensor(values: np.ndarray, dtype: str | None = None) -> Tensor:
    """Return an array as a Tensor of `dtype`, rounded to nearest, ties to even; None: the array's dtype.

    Overflow gives infinity, without a warning.

    8-bit floats become bfloat16, and every NaN in bfloat16 the same code. The values are converted and copied now.
    Raises CheckpointError for dtypes that files do not have.
    """
    import numpy as np

    values = np.asarray(values, order="C")  # a 0-d array keeps its shape
    own_dtype = next((name for name, form in NUMPY.items() if np.dtype(form) == values.dtype), None)
    dtype = dtype_for_writing(dtype or own_dtype or "")
    if dtype == "BF16":
        bits = values.astype("<f4").view("<u4")
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        array = np.where(np.isnan(values), 0x7FC0, rounded).astype("<u2")
    elif dtype in NUMPY:
        with np.errstate(over="ignore"):
            array = values.astype(NUMPY[dtype])
    else:
        raise CheckpointError(f"Values cannot be written as {dtype or values.dtype}. Convert them to float32 first.")
    return Tensor(tuple(values.shape), dtype, array.tobytes)


def are_equal(a: Tensor, b: Tensor) -> bool:
    """Return True if two tensors have the same shape, dtype and bytes. Reads them, unless they are one object."""
    return a is b or ((a.shape, a.dtype) == (b.shape, b.dtype) and a.load() == b.load())


def make_int64_tensor(values: Sequence[int]) -> Tensor:
    """Return whole numbers as a 1-D tensor of dtype "I64"."""
    return Tensor((len(values),), "I64", lambda: struct.pack(f"<{len(values)}q", *values))


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file by name in the header's order, and its metadata as texts, {} if there is
    none. Values are read later, on demand, and only from the same version of the file.

    Raises:
        CheckpointError: the file is no safetensors file, is a git-lfs pointer, has a header of more than 100 MB, or
            is damaged: its header is invalid, tensors overlap, leave gaps, do not have the size of their shape and
            dtype, or do not end with the file.
    """
    path = os.fspath(path)
    with open_file(path) as f:
        size = int.from_bytes(f.read(8), "little")
        version = file_version(f)
        whole = version[0]
        if size == int.from_bytes(POINTER, "little"):
            raise CheckpointError(f"{path} is git-lfs's pointer to a file. Run `git lfs pull`.")
        if not 2 <= size <= min(LARGEST_HEADER, whole - 8):
            raise make_damage_error(f"{path} is no safetensors file, or is cut off: its header would be {size} bytes")
        header = parse_json(f.read(size), f"The header of {path}")
        try:
            metadata = {str(k): str(v) for k, v in (header.pop("__metadata__", None) or {}).items()}  # MLX writes null
            listed = [(name, _parse_entry(entry)) for name, entry in header.items()]
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise make_damage_error(f"The header of {path} is damaged: {shorten_text(str(e))}") from None
    start, end = 8 + size, 0
    for name, (dtype, shape, begin, stop) in sorted(listed, key=lambda item: item[1][2:]):
        if begin != end or stop - begin != prod(shape) * BITS[dtype] // 8 or start + stop > whole:
            raise make_damage_error(f"{path} is damaged or cut off: '{name}' is not where its header says")
        end = stop
    if start + end != whole:
        raise make_damage_error(f"{path} is damaged: {whole - start - end} bytes behind its last tensor")
    return {
        name: Tensor(shape, dtype, make_part_reader(path, version, start + b, e - b))
        for name, (dtype, shape, b, e) in listed
    }, metadata


def _parse_entry(entry: Json) -> tuple[str, tuple[int, ...], int, int]:
    """Return (dtype, shape, begin, end) of a header's entry. Offsets are not compared with each other.

    Raises ValueError, KeyError or TypeError if it is malformed: an unknown dtype, more than 64 dimensions, or numbers
    that are no ints from 0 to 2^63 - 1.
    """
    begin, stop = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if entry["dtype"] not in BITS:
        raise ValueError(f"dtype {entry['dtype']!r}")
    if len(shape) > MOST_DIMENSIONS or not all(type(n) is int and 0 <= n < 2**63 for n in (begin, stop, *shape)):
        raise ValueError(f"{entry}")
    return entry["dtype"], shape, begin, stop


def file_version(f: IO[bytes]) -> tuple[int, int]:
    """Return size and modification time in ns of an open file; they show that a file was replaced.

    Inodes are not reliable.
    """
    facts = os.fstat(f.fileno())
    return facts.st_size, facts.st_mtime_ns


def make_part_reader(path: str, version: tuple[int, int], begin: int, size: int) -> Callable[[], bytes]:
    """Return a function that reads `size` bytes of a file at `begin`.

    It raises CheckpointError if the file has another version then. The check comes after the read; fewer bytes than
    `size` raise the error as well.
    """

    def load() -> bytes:
        """Return `size` bytes of the file from `begin` on; the file is opened and closed at each call.

        Raises CheckpointError if the file has another version than at first, or ends before.
        """
        with open_file(path) as f:
            f.seek(begin)
            data = f.read(size)
            same = file_version(f) == version and len(data) == size
        if not same:  # otherwise tensors of two saves would be mixed
            raise CheckpointError(f"{path} was replaced while it was read. Run the command again.")
        return data

    return load


def write_safetensors(path: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors into a safetensors file, which appears completely or not at all."""
    put_in_place(path, lambda to: write_tensors(to, list_sources(tensors), metadata))


def list_sources(tensors: Mapping[str, Tensor]) -> list[tuple[str, str, tuple[int, ...], int, Callable[[], Bytes]]]:
    """Return (name, dtype, shape, bytes of a number, function that loads the bytes) of each tensor."""
    return [(name, t.dtype, t.shape, BITS[t.dtype] // 8, t.load) for name, t in tensors.items()]


# RoPE rotates pairs of a head's rows: i with i + d/2 in transformers' order, 2i with 2i + 1 in that of llama.cpp,
# torchtune and Meta's own


def reorder_rows(t: Tensor, heads: int, to_halves: bool) -> Tensor:
    """Return rows (heads · d, …) reordered within each head, bit for bit, on load: from pairs to two halves, or back.

    Raises BaseModelMismatchError if the rows do not divide into heads of an even size.
    """
    import numpy as np

    rows = t.shape[0]
    if not heads or rows % (2 * heads):
        raise make_misfit_error(f"{rows} rows of q or k are no {heads} heads of an even size")
    half = rows // heads // 2
    shape = (heads, half, 2) if to_halves else (heads, 2, half)
    order = np.arange(rows).reshape(shape).transpose(0, 2, 1).reshape(-1)
    return t.rearrange(lambda values: values[order], *t.shape)
