# SPDX-License-Identifier: Apache-2.0
"""The stores of transformers' layers that hold 8-bit floats, or 4-bit ones, with a scale for each block or row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from graft.core.ops import UNKNOWN, Op
from graft.storage.integers import unpacked
from graft.storage.quantized import OwnModule

LARGEST = torch.finfo(torch.float8_e4m3fn).max
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # E2M1, by code


class Float8(OwnModule):
    """8-bit floats, times a scale.

    Args:
        scale: the name of the scales.
    """

    def __init__(self, name: str, scale: str):
        self.name, self.scale, self.parts = name, scale, ("weight", scale)

    def values(self, m: nn.Module) -> Tensor:
        W = m.weight
        if W.element_size() > 1:  # it has not been quantized
            return W.detach().clone()
        if W.dtype == torch.int8:
            W = torch.tensor(FP4, device=W.device)[unpacked(W.view(torch.uint8), 4)]
        return W.float() * self.scales(m, W.shape)

    def scales(self, m: nn.Module, shape: Sequence[int]) -> Tensor:
        """Return the scales, so that they broadcast over the weight."""
        scale = getattr(m, self.scale)
        return scale.float().reshape(-1, 1)

    def sizes(self, m: nn.Module, shape: Sequence[int]) -> tuple[int, int]:
        """Return the rows and columns that share a scale."""
        one = getattr(m, self.scale).numel() == 1
        return (shape[0], shape[1]) if one else (1, shape[1])

    def packed(self, m: nn.Module, W: Tensor) -> dict[str, object]:
        if m.weight.element_size() > 1:
            return {"weight": nn.Parameter(W.to(m.weight.dtype), requires_grad=m.weight.requires_grad)}
        old, rows, columns = getattr(m, self.scale), *self.sizes(m, W.shape)
        scale = rounded_up(largest(W.float(), rows, columns) / LARGEST, old.dtype)
        codes = W.float() / spread(numbers(scale), rows, columns, W.shape)
        made = scale.reshape(old.shape)
        return {
            "weight": nn.Parameter(codes.clamp(-LARGEST, LARGEST).to(m.weight.dtype), requires_grad=False),
            self.scale: nn.Parameter(made, requires_grad=old.requires_grad),
        }

    def snapshot(self, m: nn.Module, name: str = "weight", shared: bool = False) -> dict[str, object]:
        return {part: getattr(m, part) for part in self.parts if part == "weight" or m.weight.element_size() == 1}

    def compute_dtype(self, m: nn.Module) -> torch.dtype | None:
        return m.weight.dtype if m.weight.element_size() > 1 else None


class Blocks(Float8):
    """FP8Linear: a scale for each block, or one for all; 4-bit floats with a scale for each 32 of a row."""

    def scales(self, m: nn.Module, shape: Sequence[int]) -> Tensor:
        scale = numbers(getattr(m, self.scale))
        return scale.reshape(1, 1) if scale.numel() == 1 else spread(scale, *self.sizes(m, shape), shape)

    def sizes(self, m: nn.Module, shape: Sequence[int]) -> tuple[int, int]:
        scale = getattr(m, self.scale)
        if scale.numel() == 1:
            return shape[0], shape[1]
        if m.weight.dtype == torch.int8 or m.block_size is None:
            return -(-shape[0] // scale.shape[0]), -(-shape[1] // scale.shape[1])
        return tuple(m.block_size)

    def fixed(self, m: nn.Module, name: str = "weight") -> str | None:
        if name == "weight" and m.weight.dtype == torch.int8:
            return "its weight is 4-bit floats, which graft does not know how to write"
        return super().fixed(m, name)

    def loses_gradient(self, m: nn.Module) -> bool:
        """Return True for 4-bit floats, through which transformers has no backward pass."""
        return m.weight.dtype == torch.int8


def numbers(scale: Tensor) -> Tensor:
    """Return scales in float32; bytes are exponents of two, from -127."""
    return (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()


def spread(scale: Tensor, rows: int, columns: int, shape: Sequence[int]) -> Tensor:
    """Return for each number of a weight (out, in) the scale of its block."""
    return scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: shape[0], : shape[1]]


def largest(W: Tensor, rows: int, columns: int) -> Tensor:
    """Return the largest magnitude in each block of W; those at the border may be smaller."""
    down, right = -W.shape[0] % rows, -W.shape[1] % columns
    W = nn.functional.pad(W, (0, right, 0, down))
    blocks = W.reshape(W.shape[0] // rows, rows, W.shape[1] // columns, columns).abs()
    return blocks.amax((1, 3)).clamp_min(1e-12)


def rounded_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scales in the dtype that holds them; powers of two are not smaller than what they stand for."""
    if dtype.itemsize > 1:
        return scale.to(dtype)
    power = scale.log2().ceil()
    return (power + 127).to(torch.uint8) if dtype == torch.uint8 else power.exp2().to(dtype)


TRANSFORMERS = "transformers.integrations"
MODULES = {
    f"{TRANSFORMERS}.finegrained_fp8.FP8Linear": Blocks("fp8", "weight_scale_inv"),
    f"{TRANSFORMERS}.finegrained_fp8.FP8GroupedLinear": Blocks("fp8", "weight_scale_inv"),
    f"{TRANSFORMERS}.fbgemm_fp8.FbgemmFp8Linear": Float8("fbgemm_fp8", "weight_scale"),
    f"{TRANSFORMERS}.compressed_tensors.CompressedTensorsFP8Linear": Float8("compressed-tensors", "weight_scale"),
}
OPS: dict[str, Op] = {f"{TRANSFORMERS}.finegrained_fp8.FP8GroupedLinear": UNKNOWN}  # a stack: (…, groups, in)
