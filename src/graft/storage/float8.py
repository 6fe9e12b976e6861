# SPDX-License-Identifier: Apache-2.0
# Supported inside: rooms may import this module.
"""Floats of 8 and 4 bits with a scale for each block or row: their codec, and the stores of transformers' layers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from graft.core.ops import UNKNOWN, Op
from graft.storage.quantized import OwnModule

Values = tuple[float, ...]
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # E2M1, by code

MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # between the magnitudes of 4-bit floats
TOP = 7.0  # the largest number that still rounds to 6.0


class Float8(OwnModule):
    """The store of layers with 8-bit floats and a scale for each block, or one for all; or with 4-bit floats and a
    scale for each 32 of a row.

    A weight wider than a byte has not been quantized: it is read and written as it is.

    Args:
        scale: the name of the module's attribute with the scales.
    """

    typed = "weight"

    def __init__(self, name: str, scale: str):
        """Keep the store's name and the attribute of the scales. The parts are "weight" and that attribute."""
        self.name, self.scale, self.parts = name, scale, ("weight", scale)

    def values(self, m: nn.Module) -> Tensor:
        """Return the weight (out, in) in float32, decoded with its scales and the module's `block_size`, if it has
        that. A weight that is not quantized (wider than a byte) is cloned in its dtype.
        """
        if m.weight.element_size() > 1:  # it has not been quantized
            return m.weight.detach().clone()
        return decode(m.weight, self.scales(m), getattr(m, "block_size", None))

    def scales(self, m: nn.Module) -> Tensor:
        """Return the module's scales in a shape that `expand_scales` takes."""
        return getattr(m, self.scale)

    def pack(self, m: nn.Module, W: Tensor) -> dict[str, object]:
        """Return new parameters for the weight and its scales, by name, encoded as the old ones are, in blocks of the
        module's `block_size`, if it has one.

        The weight requires no gradient; scales keep shape and requires_grad. For a weight that is not quantized (wider
        than a byte) return only `weight`: W in the old dtype, with the old requires_grad.
        """
        if m.weight.element_size() > 1:
            return {"weight": nn.Parameter(W.to(m.weight.dtype), requires_grad=m.weight.requires_grad)}
        old = getattr(m, self.scale)
        codes, scale = encode(W, m.weight, self.scales(m), getattr(m, "block_size", None))
        return {
            "weight": nn.Parameter(codes, requires_grad=False),
            self.scale: nn.Parameter(scale.view(old.shape), requires_grad=old.requires_grad),
        }

    def snapshot(self, m: nn.Module, name: str = "weight", shared: bool = False) -> dict[str, object]:
        """Return the weight and, if it is quantized, its scales, by the names of the attributes and without a copy."""
        return {part: getattr(m, part) for part in self.parts if part == "weight" or m.weight.element_size() == 1}

    def why_unwritable(self, m: nn.Module, name: str = "weight") -> str | None:
        """Return why merging cannot write: a weight of 4-bit floats (stored as int8), or the reason of all quantized
        stores.

        None if it can. Tensors of other names have the rules of the base class.
        """
        if name == "weight" and m.weight.dtype == torch.int8:
            return "its weight is 4-bit floats, which graft does not know how to write"
        return super().why_unwritable(m, name)

    def loses_gradient(self, m: nn.Module) -> bool:
        """Return True for 4-bit floats (int8 codes), through which transformers has no backward pass."""
        return m.weight.dtype == torch.int8


class Rows(Float8):
    """The store of layers with 8-bit floats and a scale for each row, whatever the shape of the scales."""

    def scales(self, m: nn.Module) -> Tensor:
        """Return the scales that the base class decodes, as (out, 1)."""
        return super().scales(m).reshape(-1, 1)


def decode(codes: Tensor, scale: Tensor, block: Sequence[int] | None = None) -> Tensor:
    """Return the values of a matrix (out, in) in float32, in new memory.

    Args:
        codes: floats of 8 bits (out, in); or bytes (out, in/2) of two floats of 4 bits, the low half first.
        scale: see `expand_scales`.
        block: the rows and columns of 8-bit floats that share a scale; None, or 4 bits: the scales divide the matrix
            evenly.
    """
    W, block = (codes.float(), block) if codes.is_floating_point() else (unpack_pairs(codes, FP4, True), None)
    return W.mul_(expand_scales(scale, W.shape, block))


def encode(W: Tensor, codes: Tensor, scale: Tensor, block: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """Return codes and scales of a matrix W (out, in), in the dtypes and shapes of the old ones.

    For 8-bit floats a clone of the old scales gets new ones for the blocks of W: the largest magnitude of a block, at
    least 1e-12, divided by the largest float, then `round_scales_up`. Scales beyond the blocks of W keep their values.
    Quotients beyond the largest float are clamped.

    For 4-bit floats the old scales stay, and only grow by powers of two where numbers exceed them. The old tensors do
    not change.

    Args:
        codes: the old codes, which decide by their dtype: 8-bit floats (out, in), else pairs of 4-bit floats (out,
            in/2).
        scale: the old scales.
        block: the rows and columns of 8-bit floats that share a scale; None: the scales divide the matrix evenly.
    """
    W = W.float()
    if not codes.is_floating_point():
        new_values, grow = encode_fp4(W, decode_scales(scale))
        new_scale = scale + grow.to(scale.dtype) if scale.dtype == torch.uint8 else (scale.float() * grow.exp2())
        return new_values.view(codes.dtype), new_scale.to(scale.dtype)
    most = torch.finfo(codes.dtype).max
    new_values = round_scales_up(find_block_maxima(W, scale, block) / most, scale.dtype)
    new = scale.clone()
    new.view(-1, scale.shape[-1] if scale.dim() == 2 else 1)[: len(new_values), : new_values.shape[1]] = new_values
    return (W / expand_scales(new, W.shape, block)).clamp(-most, most).to(codes.dtype), new


def decode_scales(scale: Tensor) -> Tensor:
    """Return scales in float32; bytes (uint8) are exponents of two, less 127."""
    return (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()


def block_sizes(scale: Tensor, shape: Sequence[int], block: Sequence[int] | None = None) -> tuple[int, int]:
    """Return the rows and columns of a weight (out, in) that share a scale.

    One scale covers the whole weight. Otherwise it is `block`, or without it the sizes divided by the numbers of
    scales, rounded up.
    """
    if scale.numel() == 1:
        return shape[0], shape[1]
    return (
        (block[0], block[1]) if block else (-(-shape[0] // len(scale)), -(-shape[1] // (scale.numel() // len(scale))))
    )


def expand_scales(scale: Tensor, shape: Sequence[int], block: Sequence[int] | None = None) -> Tensor:
    """Return scales in float32 that broadcast over a weight (out, in): (1, 1) for a single one, else (out, in).

    Args:
        scale: one, (out), (out, 1), (out, groups), or one for each block.
        block: the rows and columns that share a scale; None: the scales divide the weight evenly.
    """
    if scale.numel() == 1:
        return decode_scales(scale).reshape(1, 1)
    rows, columns = block_sizes(scale, shape, block)
    whole = decode_scales(scale).reshape(len(scale), -1).repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return whole[: shape[0], : shape[1]]


def find_block_maxima(W: Tensor, scale: Tensor, block: Sequence[int] | None = None) -> Tensor:
    """Return the largest magnitude in each block of W (out, in), at least 1e-12: (blocks down, blocks across).

    Blocks at the border may be smaller.

    Args:
        scale: the old scales; without `block` their number gives the blocks.
        block: the rows and columns of a block.
    """
    rows, columns = block_sizes(scale, W.shape, block)
    down, right = -W.shape[0] % rows, -W.shape[1] % columns
    W = nn.functional.pad(W, (0, right, 0, down))
    blocks = W.reshape(W.shape[0] // rows, rows, W.shape[1] // columns, columns).abs()
    return blocks.amax((1, 3)).clamp_min(1e-12)


def round_scales_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scales in `dtype`.

    A dtype of one byte holds powers of two only: the exponent is `scale.log2().ceil()`, so that just above a power of
    two the rounded logarithm may give one less. For uint8 the result is that exponent plus 127.
    """
    if dtype.itemsize > 1:
        return scale.to(dtype)
    power = scale.log2().ceil()
    return (power + 127).to(torch.uint8) if dtype == torch.uint8 else power.exp2().to(dtype)


@lru_cache(maxsize=32)
def make_pair_table(values: Values, low_first: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a table (256,) from a byte to the values of its two codes, as one integer of twice the width of `dtype`.

    `dtype` has two or four bytes. The last 32 tables are cached, so do not write to one.

    Args:
        values: the 16 values by code.
        low_first: the low half of a byte is the first code.
    """
    table = torch.tensor(values, dtype=dtype, device=device)
    byte = torch.arange(256, device=device)
    both = [table[byte & 15], table[byte >> 4]]
    wide = {2: torch.int32, 4: torch.int64}[dtype.itemsize]
    return torch.stack(both if low_first else both[::-1], 1).view(wide)[:, 0]


def unpack_pairs(codes: Tensor, values: Values, low_first: bool, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the values of bytes (…, n) with two 4-bit codes each as (…, 2n) in `dtype`, by one gather for each pair.

    The table of pairs is cached.

    Args:
        values: the 16 values by code.
        low_first: the low half of a byte is the first code.
    """
    with torch.inference_mode(False):
        table = make_pair_table(values, low_first, dtype, codes.device)
    return table[codes.view(torch.uint8).int()].view(dtype)


def encode_fp4(W: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes of 4-bit floats, bytes (out, in/2) with the low half first, for W (out, in); and exponents (out,
    groups), whole numbers in float32.

    A number gets the nearest of the 8 magnitudes, of two equally near the smaller. The exponents (base 2, at least 0)
    say by how much scales must grow: until no number is above 7 scales. Scales that fit stay: new ones would move other
    numbers of their blocks.

    Args:
        scale: (out, groups), such as (out, in/32), in float32.
    """
    blocks = W.float().unflatten(1, (scale.shape[1], -1))  # (out, blocks, n)
    top = blocks.abs().amax(2)
    grow = torch.where(top > 0, top / (TOP * scale), 0).log2().ceil().clamp(min=0)
    scaled = blocks / (scale * grow.exp2())[..., None]
    middles = torch.tensor(MIDDLES, device=W.device)
    codes = torch.bucketize(scaled.abs().contiguous(), middles).to(torch.uint8) | (scaled < 0).to(torch.uint8) << 3
    codes = codes.flatten(1)
    return codes[:, ::2] | codes[:, 1::2] << 4, grow


TRANSFORMERS = "transformers.integrations"
MODULES = {
    f"{TRANSFORMERS}.finegrained_fp8.FP8Linear": Float8("fp8", "weight_scale_inv"),
    f"{TRANSFORMERS}.finegrained_fp8.FP8GroupedLinear": Float8("fp8", "weight_scale_inv"),
    f"{TRANSFORMERS}.fbgemm_fp8.FbgemmFp8Linear": Rows("fbgemm_fp8", "weight_scale"),
    f"{TRANSFORMERS}.compressed_tensors.CompressedTensorsFP8Linear": Rows("compressed-tensors", "weight_scale"),
}
OPS: dict[str, Op] = {f"{TRANSFORMERS}.finegrained_fp8.FP8GroupedLinear": UNKNOWN}  # a stack: (…, groups, in)
