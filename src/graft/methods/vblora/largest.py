# SPDX-License-Identifier: Apache-2.0
"""A file of the largest logits alone: their indices in the bank, and their weights but for the last."""

from __future__ import annotations

import torch
from torch import Tensor

from graft.core.errors import CheckpointError

INDICES, WEIGHTS = "_topk_indices", "_topk_weights"  # ends of names in files with the largest logits alone
ROUNDED = 1.05  # the most that weights in half precision can sum up to


def is_index(t: Tensor) -> bool:
    return not t.is_floating_point() and t.dtype is not torch.bool


def check_largest(shape: torch.Size, index: Tensor, first: Tensor, topk: int, where: str) -> None:
    """Raise CheckpointError unless these are indices and weights of the largest logits, all but the last."""
    rows, n = shape[:-1], shape[-1]
    if index.shape != (*rows, topk) or first.shape != (*rows, topk - 1) or not is_index(index):
        why = f"shapes {tuple(index.shape)} and {tuple(first.shape)}"
    elif int(index.min()) < 0 or int(index.max()) >= n:
        why = f"an index outside the bank of {n} vectors"
    elif topk > 1 and bool((index.long().sort(-1)[0].diff() == 0).any()):
        why = "one index twice"
    elif not first.is_floating_point() or bool((first.float() < 0).any() | (first.float().sum(-1) > ROUNDED).any()):
        why = "weights that are negative, or sum up to more than 1"
    else:
        return
    raise CheckpointError(
        f"{where}{INDICES} and {WEIGHTS} have {why}: they are not the {topk} largest of logits of shape {tuple(shape)}."
    )
