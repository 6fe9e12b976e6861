# SPDX-License-Identifier: Apache-2.0
"""x Aᵀ whose backward pass has projections of x in place of x: VeLoRA's, arXiv 2405.17991.

Each input vector (n,) is cut into groups of D = ⌈n / groups⌉ numbers, the last ones filled up with zeros. Of a group
x_g one number c_g = ⟨x_g, v⟩ is kept, and c_g v stands for x_g in the gradient of A. That of x is exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graft.kernels.function import Function
from graft.kernels.low_rank import autocast


def width(n: int, groups: int) -> int:
    """Return D, how many numbers of an input vector (n,) are in a group."""
    return -(-n // groups)


def grouped(x: Tensor, groups: int) -> Tensor:
    """Cut vectors into groups: (…, n) → (…, groups, D)."""
    n = x.shape[-1]
    D = width(n, groups)
    return (x if n == groups * D else nn.functional.pad(x, (0, groups * D - n))).unflatten(-1, (groups, D))


def unit(v: Tensor) -> Tensor:
    """Return v with length 1, in float32; in place of zero, a vector of equal numbers."""
    v = v.float()
    norm = v.norm()
    return torch.where(norm > 0, v / norm, v.shape[0] ** -0.5)


def mean_direction(x: Tensor, groups: int) -> Tensor:
    """Return the direction of the mean group of inputs x (…, n): (D,)."""
    mean = x.reshape(-1, x.shape[-1]).mean(0, dtype=torch.promote_types(x.dtype, torch.float32))
    return unit(grouped(mean, groups).mean(0))


def reconstructed(x: Tensor, v: Tensor, groups: int) -> Tensor:
    """Return what stands for x in the gradient of A: the reference. x (…, n), v (D,)."""
    c = grouped(x, groups) @ v
    return (c[..., None] * v).flatten(-2)[..., : x.shape[-1]]


def sketched_product(x: Tensor, A: Tensor, v: Tensor, groups: int, scale: float = 1.0) -> Tensor:
    """Return x Aᵀ in the dtype of A. The gradient of A is scale · gᵀ `reconstructed`(x). x (…, n), A (r, n), v (D,)."""
    A, v = autocast(x, A, v)
    return _Sketched.apply(x.to(A.dtype), A, v.to(A.dtype), groups, scale)  # type: ignore[no-any-return]


class _Sketched(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, v: Tensor, groups: int, scale: float) -> Tensor:
        c = grouped(x.reshape(-1, x.shape[-1]), groups) @ v  # (rows, groups)
        ctx.save_for_backward(c, A, v)
        ctx.scale = scale
        return nn.functional.linear(x, A)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        c, A, v = ctx.saved_tensors
        dx = g @ A if ctx.needs_input_grad[0] else None
        dA = None
        if ctx.needs_input_grad[1]:  # c_g v needs no forming: gᵀ (c ⊗ v) = (gᵀ c) ⊗ v
            sums = g.reshape(-1, g.shape[-1]).T @ c * ctx.scale  # (r, groups)
            dA = (sums[..., None] * v).flatten(1)[:, : A.shape[1]]
        return dx, dA, None, None, None
