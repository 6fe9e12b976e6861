# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of compressed-tensors: integers of 8 bits, or of 4 packed into 32, or 8-bit floats; scales for rows or
groups.

`x.weight` (int8) or `x.weight_packed` (int32, with `x.weight_shape`) has `x.weight_scale` and, if zero is not code 0,
`x.weight_zero_point`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from graft import UnsupportedLayerError
from graft.config.reading import Json
from graft.files.base import BaseDescription
from graft.files.merging.weights import BaseWeights, of_file, to_file
from graft.files.tensors import Tensor
from graft.storage import float8

ENDS = ("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape",
        "input_scale", "input_zero_point", "output_scale", "output_zero_point")  # fmt: skip


class Form(BaseWeights):
    """The weights of a checkpoint of compressed-tensors; tensors without a `weight_scale` are plain."""

    form = "compressed-tensors"

    def __init__(self, base: BaseDescription, config: Json):
        """Find the packed weights by their `weight_scale`, and add them to `packed` with the names of their parts.

        `shapes` gets their dense shapes and loses the names of their parts. Values are not read, except for
        `weight_shape`.

        Args:
            config: the quantization config.

        Raises:
            UnsupportedLayerError: a format other than those of packed or plain integers and 8-bit floats, transformed
                weights, or a weight that `_check` refuses.
        """
        super().__init__(base)
        kinds = {g.get("format") or config.get("format") for g in (config.get("config_groups") or {}).values()}
        strange = kinds - {"pack-quantized", "int-quantized", "naive-quantized", "float-quantized", None}
        if strange or config.get("transform_config"):
            how = ", ".join(map(str, strange)) or "transformed weights"
            raise UnsupportedLayerError(
                f"{base.path} is held by compressed-tensors as {how}, "
                "which merging cannot read. Merge into the model as it was before, and quantize the result."
            )
        self.bits: dict[str, int] = {}
        for key in base.tensors:
            stem, _, end = key.rpartition(".")
            if end != "weight_scale":
                continue
            parts = [n for e in ENDS if (n := f"{stem}.{e}") in base.tensors]
            name = f"{stem}.weight"
            self._check(name, parts, config)
            self.packed[name] = parts
            for part in parts:
                self.shapes.pop(part, None)
            codes = base.tensors[parts[0]]
            shape = f"{stem}.weight_shape"
            self.shapes[name] = tuple(int(n) for n in of_file(base.tensors[shape])) if shape in parts else codes.shape

    def _check(self, name: str, parts: list[str], config: Json) -> None:
        """Set the number of bits of weight `name` in `bits`: 4 or 8 by the config if its first part is int32, that is
        packed, else 8.

        Raises:
            UnsupportedLayerError: groups have their own order (g_idx), the codes have another dtype than int32, int8 or
                float8 e4m3, or packed weights have other or several numbers of bits.
        """
        if f"{name}_g_idx" in parts:
            raise UnsupportedLayerError(
                f"'{name}' has groups in another order (g_idx), which merging cannot read. Merge before quantization."
            )
        kind = self.base.tensors[parts[0]].dtype
        if kind not in ("I32", "I8", "F8_E4M3"):
            raise UnsupportedLayerError(
                f"'{parts[0]}' is of dtype {kind}, which merging cannot read. Merge before it is compressed."
            )
        groups = list((config.get("config_groups") or {}).values())
        bits: set[Any] = {(g.get("weights") or {}).get("num_bits") for g in groups}
        if kind == "I32" and (len(bits) != 1 or bits.isdisjoint({4, 8})):
            raise UnsupportedLayerError(f"'{name}' is packed with {bits} bits. Quantize it with 4 or 8, one for all.")
        self.bits[name] = bits.pop() if kind == "I32" else 8

    def unpack(self, name: str, parts: Mapping[str, Tensor]) -> torch.Tensor:
        """Return the dense weight in float32: (codes - zero point) * scale, rounded to the scale's dtype as the layer
        computes it.
        """
        codes, shape = of_file(parts[self.packed[name][0]]), self.shapes[name]
        if codes.dtype == torch.int32:
            codes = unpack_codes(codes, self.bits[name], shape[1])
        W = codes.float()
        scale = of_file(parts[f"{name}_scale"])
        if (zero := self._zero(name, parts, scale)) is not None:
            W -= float8.expand_scales(zero, W.shape)
        return (W * float8.expand_scales(scale, W.shape)).to(scale.dtype).float()  # as the layer computes it

    def _zero(self, name: str, parts: Mapping[str, Tensor], scale: torch.Tensor) -> torch.Tensor | None:
        """Return the zero points in float32, unpacked along the rows if they are packed into int32; None if there are
        none.
        """
        if f"{name}_zero_point" not in parts:
            return None
        zero = of_file(parts[f"{name}_zero_point"])
        if zero.dtype == torch.int32:  # packed along the rows
            zero = unpack_codes(zero.T.contiguous(), self.bits[name], scale.shape[0]).T
        return zero.float()

    def pack(self, name: str, W: torch.Tensor) -> dict[str, Tensor]:
        """Return the tensors of a packed weight for the dense `W`, with new codes and scales; zero points are the old
        ones.

        A scale grows only where the old one cannot reach all values, so that unchanged values keep their codes. Integer
        codes are rounded, clamped to their range, and packed as before; 8-bit floats are clamped to ±448.
        """
        old = self.parts(name)
        first, scale = of_file(old[self.packed[name][0]]), of_file(old[f"{name}_scale"])
        zero, kind = self._zero(name, old, scale), first.dtype
        most = 448.0 if kind == torch.float8_e4m3fn else 2.0 ** (self.bits[name] - 1) - 1
        # old scales where they suffice, so that unchanged values keep their codes
        if zero is None:
            reach = float8.find_block_maxima(W.float(), scale).reshape(scale.shape)
            grown = torch.where(reach > scale.float() * (most + 0.5), reach / most, scale.float()).to(scale.dtype)
        else:
            grown = extend_scales(W, scale.float(), zero, most).to(scale.dtype)
        codes = W.float() / float8.expand_scales(grown, W.shape)
        if zero is not None:
            codes += float8.expand_scales(zero, W.shape)
        if kind == torch.float8_e4m3fn:
            values = codes.clamp_(-most, most).to(kind)
        else:
            values = codes.round_().clamp_(-most - 1, most).to(torch.int8)
            values = pack_codes(values, self.bits[name]) if kind == torch.int32 else values
        return old | {self.packed[name][0]: to_file(values), f"{name}_scale": to_file(grown)}


def unpack_codes(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Return the signed codes (rows, columns) in int8 from words of 32 bits; columns beyond `columns` are dropped.

    The first code is in the lowest bits, and is stored plus 2^(bits-1): stored 0 is the smallest code.
    """
    at = torch.arange(0, 32, bits)
    codes = (words[..., None] >> at) & (2**bits - 1)
    return (codes.flatten(1)[:, :columns] - 2 ** (bits - 1)).to(torch.int8)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return codes (rows, columns) packed into int32 words, the inverse of `unpack_codes`.

    The last word of a row is filled up with stored zeros.
    """
    each = 32 // bits
    raised = torch.nn.functional.pad(codes.long() + 2 ** (bits - 1), (0, -codes.shape[1] % each))
    words = (raised.view(len(codes), -1, each) << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def extend_scales(W: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, most: float) -> torch.Tensor:
    """Return scales that let codes from -most - 1 to most, minus their zero point, cover all values of each group of W.

    A scale that suffices stays. W is read in float32. A group's end with the code `zero` itself cannot be extended, and
    is skipped.
    """
    parts = W.float().reshape(*scale.shape, -1)
    for end, last in ((parts.amax(-1), most - zero), (parts.amin(-1), -most - 1 - zero)):
        beyond = (last != 0) & (end / last > scale)
        scale = torch.where(beyond, end / last, scale)
    return scale
