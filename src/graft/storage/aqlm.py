# SPDX-License-Identifier: Apache-2.0
"""The store of AQLM's layers, arXiv 2401.06118: a group of weights is a sum of entries of codebooks, times a scale."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graft.storage.quantized import OwnModule


class Aqlm(OwnModule):
    name = "aqlm"
    parts = ("codes", "codebooks", "scales")
    calibrated = "its weight is AQLM codes that were calibrated"

    def values(self, m: nn.Module) -> Tensor:
        """Return the sum of the codebooks' entries for each group, times the scales; permuted codes are put back in
        order.
        """
        books, codes = m.codebooks, m.codes
        n_books, size, out_group, in_group = books.shape
        groups = m.out_features // out_group, m.in_features // in_group
        if is_permuted(m, groups):
            codes = codes.transpose(0, 1)
        codes = codes.long() % size  # the file has signed integers
        W = torch.zeros(*groups, out_group, in_group, dtype=books.dtype, device=books.device)
        for book in range(n_books):
            W += books[book, codes[..., book]]
        return (W * m.scales).transpose(1, 2).reshape(m.out_features, m.in_features)

    def compute_dtype(self, m: nn.Module) -> torch.dtype:
        return m.codebooks.dtype

    def loses_gradient(self, m: nn.Module) -> bool:
        """Return True for codes that AQLM's kernel for CPUs has permuted: its backward pass takes them for
        unpermuted.
        """
        return holds_byte_codes(m)

    def protect(self, y: Tensor) -> Tensor:
        return y.clone()


def is_permuted(m: nn.Module, groups: tuple[int, int]) -> bool:
    """Return True if a first call on a CPU has put the groups of inputs first."""
    if groups[0] != groups[1]:
        return tuple(m.codes.shape[:2]) != groups
    return holds_byte_codes(m) and m.gemv_op is not None


def holds_byte_codes(m: nn.Module) -> bool:
    """Return True if the codes are bytes on a CPU, where AQLM has a kernel that permutes them."""
    return bool(m.codebooks.shape[1] == 256 and m.codes.device.type == "cpu")


MODULES = {"aqlm.inference.QuantizedLinear": Aqlm()}
