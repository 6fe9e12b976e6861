# SPDX-License-Identifier: Apache-2.0
"""The content of a GGUF file: its fields, and its tensors, which are read on demand.

The package gguf makes an object of each number of an array, and believes every length that a file states. This reader
compares each length with the bytes that are left.
"""

from __future__ import annotations

import struct
from math import prod
from types import ModuleType
from typing import IO, Any

from graft import CheckpointError
from graft.config.reading import Json, open_file
from graft.core.errors import shorten_text
from graft.files.errors import PackageNeededError, make_damage_error
from graft.files.tensors import BITS, Tensor, file_version, make_part_reader

MAGIC = b"GGUF"
VERSIONS = (2, 3)
NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # struct's letter of each type of value
TEXT, ARRAY = 8, 9
DTYPES = {0: "F32", 1: "F16", 30: "BF16"}  # number of a type in ggml → safetensors' name
MOST = 2**20  # entries of all arrays, fields and tensors: a vocabulary has 2**18
MOST_DIMENSIONS = 4
ALIGNMENT = "general.alignment"


def read_contents(path: str) -> tuple[Json, dict[str, Tensor]]:
    """Return the fields of a GGUF file, and its tensors, read on demand; quantized ones are dequantized to float32
    then.

    Raises:
        CheckpointError: the file is damaged or cut off, or states a length that it cannot have.
        PackageNeededError: a tensor is quantized, and the package gguf is missing.
    """
    with open_file(path) as f:
        return Reader(f, path).contents()


class Reader:
    """Reads a GGUF file from its beginning to its tensors. Every length is compared with the bytes that are left.

    Attributes:
        left: bytes of the file that have not been read.
        entries: how many more entries of arrays, fields and tensors it may have.
    """

    def __init__(self, f: IO[bytes], path: str):
        """Start at the beginning of `f`; `version` (size and time of the file) detects later changes.

        `left` is the file's size, and `entries` 2²⁰. Nothing is read.
        """
        self.f, self.path, self.version = f, path, file_version(f)
        self.left, self.entries = self.version[0], MOST

    def make_damage_error(self, why: str) -> CheckpointError:
        """Return (do not raise) a CheckpointError: the file is damaged or cut off, with the reason `why`."""
        return make_damage_error(f"{self.path} is damaged or cut off: {why}")

    def take(self, n: int) -> bytes:
        """Return the next n bytes, and subtract n from `left`.

        Raises CheckpointError, before it reads, if n is above `left`.
        """
        if n > self.left:
            raise self.make_damage_error(f"it states a length of {n:,} bytes, and has {self.left:,} left")
        self.left -= n
        return self.f.read(n)

    def number(self, form: str = "Q") -> Any:
        """Return the next little-endian number, in struct's `form`; by default 8 bytes unsigned. Raises as `take`."""
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def count(self, n: int, least: int) -> int:
        """Return `n`, and subtract it from `entries`.

        Raises CheckpointError if the file has too few bytes for n entries of `least` bytes each, or too many entries.
        """
        self.entries -= n
        if n * least > self.left or self.entries < 0:
            raise self.make_damage_error(f"it states {n:,} entries, and has {self.left:,} bytes left")
        return n

    def text(self) -> str:
        """Return the next text: a length of 8 bytes, then UTF-8.

        Raises CheckpointError if it is not UTF-8, or cut off.
        """
        try:
            return self.take(self.number()).decode()
        except UnicodeDecodeError:
            raise self.make_damage_error("a text of it is not UTF-8") from None

    def value(self, kind: int) -> object:
        """Return the next value of type number `kind`: a text, a number, a bool, or a list of texts or numbers.

        Raises CheckpointError for an unknown type, an array of arrays, or a length beyond the file.
        """
        if kind == TEXT:
            return self.text()
        if kind == ARRAY:
            kind, n = self.number("I"), self.number()
            if kind == TEXT:
                return [self.text() for _ in range(self.count(n, 8))]
            if kind in NUMBERS:
                n = self.count(n, struct.calcsize(f"<{NUMBERS[kind]}"))
                form = f"<{n}{NUMBERS[kind]}"
                return list(struct.unpack(form, self.take(struct.calcsize(form))))
        if kind not in NUMBERS:
            raise self.make_damage_error(f"it has a value of type {kind}")
        return self.number(NUMBERS[kind])

    def contents(self) -> tuple[Json, dict[str, Tensor]]:
        """Return all fields, and the tensors by name, which load on demand. Reads from the file's start position on.

        Tensors begin at the next multiple of the alignment field after the header, 32 if there is none.

        Raises:
            CheckpointError: no GGUF of version 2 or 3, a field or tensor that is there twice, an alignment that is no
                int from 1 to 65536, or a damaged part.
        """
        if self.take(4) != MAGIC or self.number("I") not in VERSIONS:
            raise CheckpointError(f"{self.path} is no GGUF file of version 2 or 3. Convert it by llama.cpp's tools.")
        tensors, fields = self.number(), dict[str, Any]()
        for _ in range(self.count(self.number(), 13)):
            name = self.text()
            if name in fields:
                raise self.make_damage_error(f"the field '{shorten_text(name)}' stands twice")
            fields[name] = self.value(self.number("I"))
        infos = [self.info() for _ in range(self.count(tensors, 24))]
        step = fields.get(ALIGNMENT, 32)
        if type(step) is not int or not 0 < step <= 2**16:
            raise self.make_damage_error(f"{ALIGNMENT} is {step!r}")
        start = self.f.tell() + -self.f.tell() % step
        out = {name: self.tensor(name, shape, kind, start + offset) for name, shape, kind, offset in infos}
        if len(out) < len(infos):
            raise self.make_damage_error("a tensor's name stands twice")
        return fields, out

    def info(self) -> tuple[str, tuple[int, ...], int, int]:
        """Return the next tensor's name, shape (rows first), type number, and offset in the part of tensors.

        Raises CheckpointError for more than 4 dimensions.
        """
        name, n = self.text(), self.number("I")
        if n > MOST_DIMENSIONS:
            raise self.make_damage_error(f"tensor '{shorten_text(name)}' has {n} dimensions")
        shape = struct.unpack(f"<{n}Q", self.take(8 * n))
        return name, shape[::-1], self.number("I"), self.number()

    def tensor(self, name: str, shape: tuple[int, ...], kind: int, begin: int) -> Tensor:
        """Return a tensor that loads from byte `begin`. One of a quantized type is F32, dequantized when it loads.

        Raises:
            CheckpointError: the type is unknown, the last dimension is no whole number of blocks, or the file is too
                short.
            PackageNeededError: the type is quantized, and the package gguf is missing.
        """
        if kind in DTYPES:
            block, size = 1, BITS[DTYPES[kind]] // 8
        else:  # (0, 0) if the package gguf does not have the type
            block, size = import_gguf().GGML_QUANT_SIZES.get(kind, (0, 0))
        nbytes = prod(shape) // max(block, 1) * size
        if not block or (shape[-1] if shape else 1) % block or begin + nbytes > self.version[0]:
            raise self.make_damage_error(
                f"tensor '{shorten_text(name)}' of type {kind} and shape {shape} is not all there"
            )
        load = make_part_reader(self.path, self.version, begin, nbytes)
        if kind in DTYPES:
            return Tensor(shape, DTYPES[kind], load)
        rows = (*shape[:-1], shape[-1] // block * size)
        return Tensor(shape, "F32", lambda: dequantize(load(), rows, kind, name))


def dequantize(data: bytes, rows: tuple[int, ...], kind: int, name: str) -> bytes:
    """Return the bytes of a quantized tensor's values in float32.

    Args:
        rows: the shape of the quantized bytes.

    Raises:
        CheckpointError: the package gguf cannot dequantize this type.
    """
    import numpy as np

    gguf = import_gguf()
    try:
        values = gguf.quants.dequantize(np.frombuffer(data, "u1").reshape(rows), gguf.GGMLQuantizationType(kind))
    except NotImplementedError as e:
        raise CheckpointError(
            f"Tensor '{name}' is of type {kind}: {e}. Convert it to F16 by llama.cpp's tools."
        ) from None
    return values.astype("<f4").tobytes()


def import_gguf() -> ModuleType:
    """Return llama.cpp's Python package gguf.

    Raises:
        PackageNeededError: it is not installed, or another module is called gguf.
    """
    try:
        import gguf
    except ImportError as e:
        raise PackageNeededError("GGUF files need the package gguf. Run pip install 'gguf>=0.10'.") from e
    if not hasattr(gguf, "MODEL_ARCH_NAMES"):
        raise PackageNeededError(
            f"The module gguf of {getattr(gguf, '__file__', 'nowhere')} is not llama.cpp's package. Take it off the "
            "path, and pip install 'gguf>=0.10'."
        )
    return gguf
