# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of 8-bit floats with a scale for each block (DeepSeek-V3's form), as transformers reads them.

The quantized tensor `x.weight` has factors in `x.weight_scale_inv`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from graft import UnsupportedLayerError
from graft.config.reading import Json
from graft.files.base import BaseDescription
from graft.files.merging.weights import BaseWeights, of_file, to_file
from graft.files.tensors import Tensor
from graft.storage import float8

SCALE = "_scale_inv"
CODES = ("F8_E4M3", "F8_E5M2")


class Form(BaseWeights):
    """The weights of a checkpoint in 8-bit floats; tensors of other dtypes are plain."""

    form = "fp8"

    def __init__(self, base: BaseDescription, config: Json):
        """Find each 8-bit floating tensor and its scales, and add them to `packed` by the tensor's name: itself, its
        scales, and scales of activations that are there. `shapes` loses these scales.

        Args:
            config: the quantization config; `weight_block_size` gives the rows and columns of a block, and `block` is
                None without it.

        Raises:
            UnsupportedLayerError: such a tensor has no scales, or is no matrix.
        """
        super().__init__(base)
        block = config.get("weight_block_size")
        self.block = (int(block[0]), int(block[1])) if block else None
        for name, t in base.tensors.items():
            if t.dtype not in CODES:
                continue
            scale = f"{name}{SCALE}"
            if scale not in base.tensors or len(t.shape) != 2:
                raise UnsupportedLayerError(
                    f"'{name}' of {base.path} holds 8-bit floats, and '{scale}' is not there, or it is no matrix. "
                    "Save or download the base again."
                )
            beside = [f"{name.rpartition('.')[0]}.{end}" for end in ("activation_scale", "input_scale")]
            self.packed[name] = [name, scale, *(n for n in beside if n in base.tensors)]
            for part in self.packed[name][1:]:
                del self.shapes[part]

    def unpack(self, name: str, parts: Mapping[str, Tensor]) -> torch.Tensor:
        """Return the dense weight (out, in) in float32: codes times the scales of their blocks."""
        return float8.decode(of_file(parts[name]), *self._scale(name, parts))

    def _scale(self, name: str, parts: Mapping[str, Tensor]) -> tuple[torch.Tensor, tuple[int, int] | None]:
        """Return the scales of a weight, and the block (rows, columns) of config.json.

        The block is None if config.json has none, or if it does not fit the shape of the scales, which tells the block
        then.
        """
        scale = of_file(parts[f"{name}{SCALE}"])
        fits = self.block and scale.shape == tuple(-(-n // b) for n, b in zip(self.shapes[name], self.block))
        return scale, self.block if fits else None

    def pack(self, name: str, W: torch.Tensor) -> dict[str, Tensor]:
        """Return the weight's tensors with new codes and scales for the dense `W`, in the dtypes and shapes of the old
        ones.

        Scales of activations are kept.
        """
        old = self.parts(name)
        codes, scale = float8.encode(W, of_file(old[name]), *self._scale(name, old))
        return old | {name: to_file(codes), f"{name}{SCALE}": to_file(scale)}
