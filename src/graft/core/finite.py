# SPDX-License-Identifier: Apache-2.0
"""Many tensors looked at in one go: is there anything in them, and is it finite?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NARROW = 1  # bytes of a float8 number, of which torch takes no norm


@torch.no_grad()
def largest(tensors: Sequence[Tensor]) -> list[float]:
    """Return the largest magnitude in each tensor: inf or nan if one is not finite, 0 for one without numbers.

    A few kernels and one wait for each device. A tensor that is no dense one of floating numbers counts as 1.
    """
    out = [1.0] * len(tensors)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, t in enumerate(tensors):
        if not is_plain(t):
            continue
        if t.numel():
            groups.setdefault((t.device, t.dtype), []).append(i)
        else:
            out[i] = 0.0
    for places in groups.values():
        norms = torch._foreach_norm([tensors[i] for i in places], float("inf"))
        for i, value in zip(places, torch.stack(norms).tolist()):
            out[i] = value
    return out


def is_plain(t: Tensor) -> bool:
    return (
        type(t) in (Tensor, torch.nn.Parameter)
        and t.is_floating_point()
        and t.element_size() > NARROW
        and not (t.is_meta or t.is_sparse)
    )
