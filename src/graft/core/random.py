# SPDX-License-Identifier: Apache-2.0
"""Random values as torch's constructors draw them, so that a seeded run gets PEFT's numbers."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

_SCRATCH = 1 << 14  # 64-bit words: few enough for the cache
_WORTH = 1 << 12  # numbers: with fewer, `skip` costs more than it gains


@cache
def kaiming_bound(fan_in: int) -> float:
    """Return the bound of a new nn.Linear's values: kaiming_uniform_ with a = √5, rounded in the same steps."""
    a = math.sqrt(5)
    return math.sqrt(3.0) * (math.sqrt(2.0 / (1 + a**2)) / math.sqrt(fan_in)) if fan_in else 0.0


def skip(*tensors: Tensor) -> None:
    """Advance the generator as if to fill these with uniform values, in little more than half the time."""
    left = sum([t.numel() for t in tensors])
    if left >= _WORTH and all(t.dtype is torch.float32 and t.device.type == "cpu" for t in tensors):
        while left > 1:  # a 64-bit word takes two steps of the generator, a float one
            words = min(left // 2, _SCRATCH)
            scratch()[:words].random_(-(2**63), None)
            left -= 2 * words
        if left:
            torch.empty(1).uniform_()
        return
    for t in tensors:
        t.uniform_()  # the caller overwrites the values


@cache
def scratch() -> Tensor:
    return torch.empty(_SCRATCH, dtype=torch.int64, device="cpu")
