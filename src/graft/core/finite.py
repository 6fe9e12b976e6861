# SPDX-License-Identifier: Apache-2.0
"""Checks of many tensors at once: is any number not zero, are all finite, how much of an update did rounding keep?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NARROW = 1  # bytes of a float8 number: torch computes no norm of them


def is_finite(number: float) -> bool:
    """Return True if float32, the dtype of adapters, represents a number as a finite one. False for NaN."""
    return abs(number) <= torch.finfo(torch.float32).max


@torch.no_grad()
def max_magnitudes(tensors: Sequence[Tensor]) -> list[float]:
    """Return the largest magnitude in each tensor: inf or nan if a number is not finite, 0.0 for an empty tensor.

    Tensors of one device and dtype share a kernel, with one wait for each such group. A tensor that `is_dense_float`
    rejects counts as 1.0.
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
    """Return True for a strided tensor or parameter of floating numbers of two bytes or more.

    False for subclasses, such as shards, and for integers, float8, meta tensors and all sparse layouts.
    """
    return (
        type(t) in (Tensor, torch.nn.Parameter)
        and t.is_floating_point()
        and t.element_size() > NARROW
        and t.layout == torch.strided
        and not t.is_meta
    )


AT_ONCE, ON_CPU = 2**24, 2**16  # numbers per block: small copies; on a CPU they fit the cache


def dot_product(a: Tensor, b: Tensor) -> Tensor:
    """Return the scalar product of two tensors of one shape, ()."""
    return torch.dot(a.flatten(), b.flatten())


def dtensor_dot_product(a: Tensor, b: Tensor) -> Tensor:
    """Return the scalar product, (), of two DTensors, split over processes. Each process gets the full value."""
    return (a * b).sum().full_tensor()  # type: ignore[attr-defined,no-any-return]


@torch.no_grad()
def measure_survival(W: Tensor, wide: Tensor, after: Tensor | None = None) -> Tensor:
    """Return <W' - W, ΔW> and <ΔW, ΔW> in float32, (2,), where ΔW = wide - W.

    Their quotient is the part of an update that rounding kept.

    To save memory, the weight is read in blocks of rows, of 2¹⁶ numbers on a CPU and 2²⁴ elsewhere. The result for an
    empty weight is zeros. DTensors are read at once, and each process gets the products of the whole
    (`dtensor_dot_product`).

    Args:
        W: the weight before the update, as stored.
        wide: the updated weight before rounding.
        after: W', the updated weight after rounding; None: `wide` rounded to W's dtype. If it is W itself, this
            function writes the rounded `wide` into W, and destroys the values of `wide`.
    """
    at_once, spread = ON_CPU if W.device.type == "cpu" else AT_ONCE, hasattr(W, "full_tensor")
    rows, product = (
        (max(1, len(W)), dtensor_dot_product) if spread else (max(1, at_once // max(1, W[:1].numel())), dot_product)
    )
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
