# SPDX-License-Identifier: Apache-2.0
"""Merging into a packed stack of matrices, such as those of experts, of which one at a time is dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from graft.core.finite import survival

Fold = Callable[[int, Tensor], Tensor]  # expert, a matrix (out, in) in at least float32 → what it shall be


class Stack(Protocol):
    """A packed stack, (experts, out, in)."""

    @property
    def shape(self) -> tuple[int, int, int]: ...
    @property
    def dtype(self) -> torch.dtype | None: ...  # of the dense stack; None: float32
    def in_rows(self) -> Stack: ...  # of which single matrices can be read
    def matrix(self, expert: int, dtype: torch.dtype) -> Tensor: ...
    def remake(self, matrix: Callable[[int], Tensor]) -> Stack: ...  # a new stack


def changed(stack: Stack, fold: Fold, expert: int) -> tuple[Tensor, Tensor]:
    """Return a matrix (out, in) as it is; and as it shall be, in at least float32."""
    W = stack.matrix(expert, stack.dtype or torch.float32)
    return W, fold(expert, W.to(torch.promote_types(W.dtype, torch.float32)))


def merged(stack: Stack, fold: Fold) -> tuple[Stack, Tensor]:
    """Return a new stack with changes in it, and what rounding left of them (`survival`)."""
    stack = stack.in_rows()

    def matrix(expert: int) -> Tensor:
        W, wide = changed(stack, fold, expert)
        return wide.to(W.dtype)

    new = stack.remake(matrix)
    shares = []
    for expert in range(stack.shape[0]):
        W, wide = changed(stack, fold, expert)
        shares.append(survival(W, wide, new.matrix(expert, W.dtype)))
    return new, torch.stack(shares).sum(0)


def stays_finite(stack: Stack, fold: Fold) -> bool:
    """Return True if all numbers of the stack with changes in it are finite in its dtype."""
    stack, finite = stack.in_rows(), []
    for expert in range(stack.shape[0]):
        W, wide = changed(stack, fold, expert)
        finite.append(wide.to(W.dtype).isfinite().all())
    return bool(torch.stack(finite).all())
