# SPDX-License-Identifier: Apache-2.0
"""Norms of a weight with a low-rank update, without forming their sum."""

from __future__ import annotations

import torch
from torch import Tensor


def plain_row_norms(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The reference. W (out, n), A (r, n), B (out, r) → (out,)."""
    return (W + B @ A).norm(dim=1)


def row_norms(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Return ‖W + BA‖ per row, in at least float32: the terms of ‖w‖² + 2⟨W Aᵀ, B⟩ + b A Aᵀ bᵀ may cancel."""
    dtype = torch.promote_types(W.dtype, torch.float32)
    W, A, B = W.to(dtype), A.to(dtype), B.to(dtype)
    square = torch.linalg.vector_norm(W, dim=1).square()
    both = torch.addmm(2 * (W @ A.T), B, A @ A.T)
    return (square + (both * B).sum(1)).clamp_(min=0).sqrt_()
