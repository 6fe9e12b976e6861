# SPDX-License-Identifier: Apache-2.0
"""The places that SHiRA trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def random_mask(base_layer: nn.Module, r: int, random_seed: int | None = None, **_: Any) -> Tensor:
    """Return a mask of the weight's shape with r · (in + out) ones at random places, the same for the same seed."""
    weight: Any = base_layer.weight
    places = random_places(weight.shape, r, random_seed).to(weight.device)
    return torch.zeros_like(weight).view(-1).index_fill(0, places, 1).view(weight.shape)


def random_places(shape: Sequence[int], r: int, seed: int | None) -> Tensor:
    """Return r · (in + out) random places of a matrix (out, in) as a flat list, in order."""
    generator = torch.Generator("cpu")  # without a seed, torch's default one
    if seed is not None:
        generator.manual_seed(seed)
    out, n = shape
    return torch.randperm(out * n, generator=generator, device="cpu")[: r * (out + n)].sort().values
