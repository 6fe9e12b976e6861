# SPDX-License-Identifier: Apache-2.0
"""The product with a weight of a narrower dtype, which is widened part by part, and never kept so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graft.kernels.eager import only_backward
from graft.kernels.function import Function

PART = 1 << 20  # numbers of the weight that are wide at a time


def plain(A: Tensor, W: Tensor) -> Tensor:
    """The reference. A (r, m), W (m, n) → (r, n), in the dtype of A."""
    return A @ W.to(A.dtype)


def product(A: Tensor, W: Tensor) -> Tensor:
    """Compute `plain`. W gets no gradient."""
    if W.dtype == A.dtype or not only_backward():
        return plain(A, W)
    return _Product.apply(A, W)  # type: ignore[no-any-return]


class _Product(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(A: Tensor, W: Tensor) -> Tensor:
        return torch.cat([plain(A, part) for part in parts(W)], 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        some = parts(ctx.saved_tensors[0])
        widths = [part.shape[1] for part in some]
        return sum(h @ part.to(g.dtype).T for h, part in zip(g.split(widths, 1), some)), None


def parts(W: Tensor) -> tuple[Tensor, ...]:
    """Return W in columns of not too many numbers."""
    return W.split(max(1, PART // max(1, W.shape[0])), 1)
