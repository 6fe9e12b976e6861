# SPDX-License-Identifier: Apache-2.0
"""Many tensors looked at in one go: is there anything in them, is it finite, what did rounding leave of an update?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NARROW = 1  # bytes of a float8 number, of which torch takes no norm


def is_finite(number: float) -> bool:
    """Return True if float32, the dtype of adapters, holds a number as a finite one."""
    return abs(number) <= torch.finfo(torch.float32).max


@torch.no_grad()
def max_magnitudes(tensors: Sequence[Tensor]) -> list[float]:
    """Return the largest magnitude in each tensor: inf or nan if one is not finite, 0 for one without numbers.

    A few kernels and one wait for each device. A tensor that is no dense one of floating numbers counts as 1.
    """
    out = [1.0] * len(tensors)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, t in enumerate(tensors):
        if not is_dense_float(t):
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


def is_dense_float(t: Tensor) -> bool:
    return (
        type(t) in (Tensor, torch.nn.Parameter)
        and t.is_floating_point()
        and t.element_size() > NARROW
        and not (t.is_meta or t.is_sparse)
    )


AT_ONCE, ON_CPU = 2**24, 2**16  # numbers in one pass: few copies of a layer, and those of a CPU in its cache


def dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.flatten(), b.flatten())


def spread_dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the product of tensors that are spread over processes."""
    return (a * b).sum().full_tensor()  # type: ignore[attr-defined,no-any-return]


@torch.no_grad()
def measure_survival(W: Tensor, wide: Tensor, after: Tensor | None = None) -> Tensor:
    """Return <W' - W, ΔW> and <ΔW, ΔW> in float32, (2,), where ΔW = wide - W.

    Args:
        W: the weight as it was, and as it was stored.
        wide: the weight that was asked for, before rounding.
        after: W', what came of that; None: `wide`, rounded to W's dtype; W itself: write that into it, and use `wide`
            up on the way, as all is in the cache then.
    """
    at_once, spread = ON_CPU if W.device.type == "cpu" else AT_ONCE, hasattr(W, "full_tensor")
    rows, product = (max(1, len(W)), spread_dot) if spread else (max(1, at_once // max(1, W[:1].numel())), dot)
    total: Tensor | None = None
    for i in range(0, len(W), rows):
        before, asked = W[i : i + rows].float(), wide[i : i + rows]
        if after is W:
            new, asked = after[i : i + rows].copy_(asked).float(), asked.sub_(before)
        else:
            new = (asked.to(W.dtype) if after is None else after[i : i + rows]).float()
            asked = asked.float() - before
        both = torch.stack([product(new - before, asked), product(asked, asked)])
        total = both if total is None else total + both
    return torch.zeros(2, device=W.device) if total is None else total
