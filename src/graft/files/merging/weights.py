# SPDX-License-Identifier: Apache-2.0
"""Weights of a checkpoint as torch tensors, plain or quantized, and measures of the loss of merged ones."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch

from graft import CheckpointError, UnsupportedLayerError
from graft.config.reading import Json
from graft.files.base import BaseDescription
from graft.files.tensors import Tensor


class BaseWeights:
    """The weights of a checkpoint that is not quantized. A subclass reads and writes a quantized form.

    Attributes:
        shapes: of the dense weights, by name.
        packed: name of a dense weight → the checkpoint's tensors that hold it, the codes first.
        dtype: safetensors' name of the dtype of dense weights that are written in place of packed ones.
    """

    form = "plain"

    def __init__(self, base: BaseDescription):
        """Keep the base and a copy of its shapes; no weight is packed.

        `dtype` is "F32" or "F16" if the field `dtype`, else `torch_dtype`, of config.json is float32 or float16; else
        "BF16".
        """
        self.base = base
        self.packed: dict[str, list[str]] = {}
        self.shapes = dict(base.shapes)
        dtype = base.config.get("dtype") or base.config.get("torch_dtype")
        self.dtype = {"float32": "F32", "float16": "F16"}.get(str(dtype), "BF16")

    def read(self, name: str) -> torch.Tensor:
        """Return a dense weight: a plain one in its own dtype, a packed one in float32."""
        return self.unpack(name, self.parts(name)) if name in self.packed else of_file(self.base.tensors[name])

    def parts(self, name: str) -> dict[str, Tensor]:
        """Return the checkpoint's tensors that hold a packed weight, by name; KeyError for a plain one."""
        return {part: self.base.tensors[part] for part in self.packed[name]}

    def pack(self, name: str, W: torch.Tensor) -> dict[str, Tensor]:
        """Return the tensors that hold the dense W in the form of the old weight `name`.

        For subclasses; raises NotImplementedError here.
        """
        raise NotImplementedError

    def unpack(self, name: str, parts: Mapping[str, Tensor]) -> torch.Tensor:
        """Return the dense weight `name` in float32 from the tensors that hold it.

        For subclasses; raises NotImplementedError here.
        """
        raise NotImplementedError


FORMS = {"fp8": "block_fp8", "bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed"}  # → module


def find_base_weights(base: BaseDescription) -> BaseWeights:
    """Return the object that reads and writes a checkpoint's weights: for fp8, bitsandbytes or compressed-tensors its
    `Form`.

    The method is that of `quantization_config`, else of `compression_config`, in config.json; without both,
    BaseWeights.

    Raises:
        UnsupportedLayerError: the method is another one, or the form cannot be read.
    """
    config = base.config.get("quantization_config") or base.config.get("compression_config")
    if not config:
        return BaseWeights(base)
    method = config.get("quant_method")
    if method not in FORMS:
        raise UnsupportedLayerError(
            f"{base.path} is quantized by '{method}', which merging cannot read; it reads {', '.join(FORMS)}. Merge "
            "into the model as it was before quantization, and quantize the result."
        )
    weights: BaseWeights = import_module(f"graft.files.merging.{FORMS[method]}").Form(base, config)
    return weights


TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": getattr(torch, "float8_e8m0fnu", None),
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U32": torch.uint32,
    "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {kind: name for name, kind in TORCH.items() if kind is not None}
FLOATS = ("F64", "F32", "F16", "BF16")


def of_file(t: Tensor) -> torch.Tensor:
    """Return the values in the file's dtype. They may be read only: make a copy before writing to them.

    Raises:
        CheckpointError: this torch has no such dtype.
    """
    kind = TORCH.get(t.dtype)
    if kind is None:
        raise CheckpointError(f"This torch has no dtype for {t.dtype}. Install a newer torch.")
    data = t.load()
    if not len(data):
        return torch.empty(t.shape, dtype=kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that bytes cannot be written to
        return torch.frombuffer(data, dtype=torch.uint8).view(kind).view(t.shape)


def to_wide(t: Tensor) -> torch.Tensor:
    """Return the values in new memory: float64 for float64, else float32."""
    values = of_file(t)
    kind = torch.float32 if values.itemsize == 1 else torch.promote_types(values.dtype, torch.float32)
    return values.to(kind, copy=True)


def to_bytes(values: torch.Tensor) -> memoryview:
    """Return the little-endian bytes of a tensor on the CPU; a contiguous one shares its memory."""
    array: Any = values.detach().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(array)


def to_file(values: torch.Tensor) -> Tensor:
    """Return a file tensor of these values (on the CPU), without a copy; their bytes are taken when it is loaded."""
    return Tensor(tuple(values.shape), NAMES[values.dtype], lambda: to_bytes(values))


MEASURES = ("update", "weight", "largest_difference", "largest_relative_difference", "unchanged", "kept")
AT_ONCE = 2**18  # numbers: copies of a few rows, not of a weight


@torch.no_grad()
def measure_loss(before: torch.Tensor, exact: torch.Tensor, after: torch.Tensor) -> Json:
    """Compare a merged weight with the exact result, a few rows at a time, in float64.

    Args:
        before: the weight without adapters.
        exact: W + ΔW in float32 or float64.
        after: the output's values.

    Returns:
        update: ‖ΔW‖; weight: ‖W‖; largest_difference, largest_relative_difference: of single numbers, stored against
            exact; unchanged: the share of changed numbers that are stored as before, since the change was below half a
            unit of the dtype (0 without changes); kept: the share of ΔW that is stored, <W' - W, ΔW> / ‖ΔW‖² (1 without
            changes).
    """
    update = weight = largest = relative = share = 0.0
    changed = lost = 0
    rows = max(1, AT_ONCE // max(1, exact[:1].numel())) if exact.dim() else 1
    for at in range(0, len(exact) if exact.dim() else 1, rows):
        cut = slice(at, at + rows) if exact.dim() else ...
        wanted = exact[cut].double()
        old, new = before[cut].double(), after[cut].double()
        delta, error = wanted - old, (new - wanted).abs()
        update += float(delta.square().sum())
        weight += float(old.square().sum())
        share += float(((new - old) * delta).sum())
        largest = max(largest, float(error.max()))
        relative = max(relative, float((error / wanted.abs().clamp_min(torch.finfo(torch.float32).tiny)).max()))
        moves = delta != 0
        changed += int(moves.sum())
        lost += int((moves & (new == old.to(after.dtype).double())).sum())
    unchanged, survival = lost / changed if changed else 0.0, share / update if update else 1.0
    return dict(zip(MEASURES, (math.sqrt(update), math.sqrt(weight), largest, relative, unchanged, survival)))
