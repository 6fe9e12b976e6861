# SPDX-License-Identifier: Apache-2.0
"""Values that 4 or 8 bits can hold, in the dtype of a weight. Plain torch: no device and no package is needed."""

from __future__ import annotations

import torch
from torch import Tensor

NF4 = (  # quantiles of a normal distribution, QLoRA (arXiv 2305.14314), appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK = 64  # values that share a scale


def quantized(W: Tensor, bits: int) -> Tensor:
    """Return W (out, in) as 4 or 8 bits hold it."""
    return nf4(W) if bits == 4 else int8(W)


def nf4(W: Tensor) -> Tensor:
    """Round to the nearest of 16 values, times the largest absolute value in each block of 64."""
    codes = torch.tensor(NF4, device=W.device, dtype=W.dtype)
    flat = W.reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True)
    unit = blocks / scale.clamp(min=torch.finfo(W.dtype).tiny)
    between = (codes[1:] + codes[:-1]) / 2
    return (codes[torch.bucketize(unit, between)] * scale).view(-1)[: len(flat)].view(W.shape)


def int8(W: Tensor) -> Tensor:
    """Round to 127 steps of the largest absolute value in each row, either way."""
    scale = W.abs().amax(1, keepdim=True) / 127
    return (W / scale.clamp(min=torch.finfo(W.dtype).tiny)).round() * scale
