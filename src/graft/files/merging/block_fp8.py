# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of 8-bit floats with a scale for each block (DeepSeek-V3's form), as transformers reads them.

The quantized tensor `x.weight` stands beside `x.weight_scale_inv`, by which its values are multiplied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from graft import UnsupportedLayerError
from graft.config.reading import Json
from graft.files.base import BaseFiles
from graft.files.merging.numbers import of_file, to_file
from graft.files.merging.weights import BaseWeights
from graft.files.tensors import Tensor
from graft.storage.float8 import LARGEST, largest, rounded_up

SCALE = "_scale_inv"
CODES = ("F8_E4M3", "F8_E5M2")


class Form(BaseWeights):
    form = "fp8"

    def __init__(self, base: BaseFiles, config: Json):
        super().__init__(base)
        block = config.get("weight_block_size")
        self.block = (int(block[0]), int(block[1])) if block else None
        for name, t in base.tensors.items():
            if t.dtype not in CODES:
                continue
            scale = f"{name}{SCALE}"
            if scale not in base.tensors or len(t.shape) != 2:
                raise UnsupportedLayerError(
                    f"'{name}' of {base.path} holds 8-bit floats, and '{scale}' is not there, or it is no matrix: "
                    "graft cannot tell its values."
                )
            beside = [f"{name.rpartition('.')[0]}.{end}" for end in ("activation_scale", "input_scale")]
            self.packed[name] = [name, scale, *(n for n in beside if n in base.tensors)]
            for part in self.packed[name][1:]:
                del self.shapes[part]

    def unpack(self, name: str, parts: Mapping[str, Tensor]) -> torch.Tensor:
        W, scale = of_file(parts[name]).float(), factors(of_file(parts[f"{name}{SCALE}"]))
        return W.mul_(self._spread(scale, W.shape))

    def _sizes(self, scale: torch.Tensor, shape: Sequence[int]) -> tuple[int, int]:
        """Return the rows and columns of a block."""
        if self.block is not None and scale.shape == tuple(-(-n // b) for n, b in zip(shape, self.block)):
            return self.block
        rows, columns = scale.shape if scale.dim() == 2 else (1, 1)
        return -(-shape[0] // rows), -(-shape[1] // columns)

    def _spread(self, scale: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        if scale.numel() == 1:
            return scale.reshape(1, 1)
        rows, columns = self._sizes(scale, shape)
        return scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: shape[0], : shape[1]]

    def pack(self, name: str, W: torch.Tensor) -> dict[str, Tensor]:
        old = of_file(self.base.tensors[f"{name}{SCALE}"])
        rows, columns = tuple(W.shape) if old.numel() == 1 else self._sizes(old, W.shape)
        kind = of_file(self.base.tensors[name]).dtype
        most = LARGEST if kind == torch.float8_e4m3fn else torch.finfo(kind).max
        scale = rounded_up(largest(W.float(), rows, columns) / most, old.dtype)
        spread = self._spread(factors(scale), W.shape)
        codes = (W.float() / spread).clamp_(-most, most).to(kind)
        made = {name: to_file(codes), f"{name}{SCALE}": to_file(scale.reshape(old.shape))}
        return made | {part: self.base.tensors[part] for part in self.packed[name][2:]}


def factors(scale: torch.Tensor) -> torch.Tensor:
    """Return scales as float32; bytes are exponents."""
    return (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()
