# SPDX-License-Identifier: Apache-2.0
"""The store of AQLM's layers, arXiv 2401.06118: a group of weights is a sum of entries of codebooks, times a scale."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graft.storage.quantized import OwnModule


class Aqlm(OwnModule):
    """The store of AQLM's linear layers.

    Each group of weights is the sum of one entry of each codebook, times a scale.

    Reading works on all devices; merging is refused, as the codes were calibrated.
    """

    name = "aqlm"
    parts = ("codes", "codebooks", "scales")
    calibrated = "its weight is AQLM codes that were calibrated"
    copies = "all"
    typed = "codebooks"

    def values(self, m: nn.Module) -> Tensor:
        """Return the weight (out, in) in the codebooks' dtype: the sum of the codebooks' entries for each group, times
        the scales.

        Codes are taken modulo the size of a codebook, as files have signed integers. Codes that AQLM's CPU kernel has
        permuted (`is_permuted`) are transposed back in a copy; the module does not change.
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

    def loses_gradient(self, m: nn.Module) -> bool:
        """Return True for byte codes on a CPU (256 entries in a codebook): AQLM's kernel permutes them, and its
        backward pass reads them as unpermuted.
        """
        return holds_byte_codes(m)


def is_permuted(m: nn.Module, groups: tuple[int, int]) -> bool:
    """Return True if a first call on a CPU has put the groups of inputs first in the codes.

    If the numbers of groups differ, the first two sizes of the codes decide: they are not (out groups, in groups). If
    both numbers are equal, the codes are permuted if they are bytes on a CPU and the module's `gemv_op` is set.

    groups: numbers of groups of outputs and of inputs.
    """
    if groups[0] != groups[1]:
        return tuple(m.codes.shape[:2]) != groups
    return holds_byte_codes(m) and m.gemv_op is not None


def holds_byte_codes(m: nn.Module) -> bool:
    """Return True if codebooks have 256 entries and the codes are on a CPU, where AQLM has a kernel that
    permutes them.
    """
    return bool(m.codebooks.shape[1] == 256 and m.codes.device.type == "cpu")


MODULES = {"aqlm.inference.QuantizedLinear": Aqlm()}
