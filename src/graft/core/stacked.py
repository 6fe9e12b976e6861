# SPDX-License-Identifier: Apache-2.0
"""Merging products into a packed stack of matrices, such as those of experts, of which one at a time is dense."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from graft.core.finite import survival

Products = Sequence[tuple[Tensor, Tensor]]  # (experts, r, in) and (experts, out, r) of each


class Stack(Protocol):
    """A packed stack, (experts, out, in)."""

    @property
    def shape(self) -> tuple[int, int, int]: ...
    @property
    def dtype(self) -> torch.dtype | None: ...  # of the dense stack; None: float32
    def in_rows(self) -> Stack: ...  # of which single matrices can be read
    def matrix(self, expert: int, dtype: torch.dtype) -> Tensor: ...
    def remade(self, matrix: Callable[[int], Tensor]) -> Stack: ...  # a new stack


def added(stack: Stack, products: Products, expert: int) -> tuple[Tensor, Tensor]:
    """Return a matrix (out, in) as it is; and with the products added, in at least float32."""
    W = stack.matrix(expert, stack.dtype or torch.float32)
    wide = W.to(torch.promote_types(W.dtype, torch.float32), copy=True)
    for A, B in products:
        wide.addmm_(B[expert].to(wide), A[expert].to(wide))
    return W, wide


def merged(stack: Stack, products: Products) -> tuple[Stack, Tensor]:
    """Return a new stack with the products in it, and what rounding left of them (`survival`)."""
    stack = stack.in_rows()

    def matrix(expert: int) -> Tensor:
        W, wide = added(stack, products, expert)
        return wide.to(W.dtype)

    new = stack.remade(matrix)
    shares = []
    for expert in range(stack.shape[0]):
        W, wide = added(stack, products, expert)
        shares.append(survival(W, wide, new.matrix(expert, W.dtype)))
    return new, torch.stack(shares).sum(0)


def stays_finite(stack: Stack, products: Products) -> bool:
    """Return True if all numbers of the stack with the products in it are finite in its dtype."""
    stack, finite = stack.in_rows(), []
    for expert in range(stack.shape[0]):
        W, wide = added(stack, products, expert)
        finite.append(wide.to(W.dtype).isfinite().all())
    return bool(torch.stack(finite).all())
