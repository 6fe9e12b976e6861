# SPDX-License-Identifier: Apache-2.0
"""Norms of a weight with a low-rank update, without forming their sum."""

from __future__ import annotations

import torch
from torch import Tensor

from graft.kernels.cuts import Cut, piece_of, total, whole_of


def plain_row_norms(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The reference. W (out, n), A (r, n), B (out, r) → (out,)."""
    return (W + B @ A).norm(dim=1)


def row_norms(W: Tensor, A: Tensor, B: Tensor, rows: Cut | None = None, columns: Cut | None = None) -> Tensor:
    """Return ‖W + BA‖ per row, in at least float32: the terms of ‖w‖² + 2⟨W Aᵀ, B⟩ + b A Aᵀ bᵀ may cancel.

    rows, columns: the cut by which W is this process's piece; no gradients then.
    """
    dtype = torch.promote_types(W.dtype, torch.float32)
    W, A, B = W.to(dtype), A.to(dtype), B.to(dtype)
    own = B if rows is None else piece_of(B, rows, 0)
    square = torch.linalg.vector_norm(W, dim=1).square()
    product = W @ (A if columns is None else piece_of(A, columns, 1)).T
    if columns is not None:
        square, product = total(square, columns), total(product, columns)
    both = torch.addmm(2 * product, own, A @ A.T)
    norms = (square + (both * own).sum(1)).clamp_(min=0).sqrt_()
    return norms if rows is None else whole_of(norms, rows, 0)
