# SPDX-License-Identifier: Apache-2.0
"""Tensors of files as torch's, and back."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from graft.core.errors import CheckpointError
from graft.files.tensors import Tensor

TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": getattr(torch, "float8_e8m0fnu", None),
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
NAMES = {kind: name for name, kind in TORCH.items() if kind is not None}
FLOATS = ("F64", "F32", "F16", "BF16")


def of_file(t: Tensor) -> torch.Tensor:
    """Return the values in the file's dtype. They may be read only: make a copy before writing to them."""
    kind = TORCH.get(t.dtype)
    if kind is None:
        raise CheckpointError(f"This torch has no dtype for {t.dtype}.")
    held = t.load()
    if not len(held):
        return torch.empty(t.shape, dtype=kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that bytes cannot be written to
        return torch.frombuffer(held, dtype=torch.uint8).view(kind).view(t.shape)


def wide(t: Tensor) -> torch.Tensor:
    """Return the values as float32, or float64 if they are that; new memory."""
    values = of_file(t)
    return values.to(torch.promote_types(values.dtype, torch.float32), copy=True)


def to_bytes(values: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor, little-endian as torch's on every machine that it runs on."""
    held: Any = values.detach().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(held)


def to_file(values: torch.Tensor) -> Tensor:
    return Tensor(tuple(values.shape), NAMES[values.dtype], lambda: to_bytes(values))
