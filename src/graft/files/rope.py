# SPDX-License-Identifier: Apache-2.0
"""The order of the rows of q and k in a head: two halves in transformers, pairs in llama.cpp, torchtune and Meta's own.

RoPE turns pairs of them: entry i with i + d/2 in the one order, 2i with 2i + 1 in the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from graft import BaseModelMismatchError
from graft.files.errors import BaseNeededError
from graft.files.tensors import Tensor, rearranged

if TYPE_CHECKING:
    from graft.files.formats import Base


def heads_of(base: Base, keys: bool) -> int:
    """Return the number of heads of a base's queries, or of its keys.

    Raises:
        BaseNeededError: its config does not say it.
    """
    heads = base.config.get("num_attention_heads")
    heads = base.config.get("num_key_value_heads") or heads if keys else heads
    if not isinstance(heads, int) or heads < 1:
        raise BaseNeededError(f"The config of {base.path} does not say how many attention heads it has.")
    return heads


def interleaved(t: Tensor, heads: int) -> Tensor:
    """Return rows (heads · d, …) that were in two halves per head as pairs, bit for bit."""
    return _reordered(t, heads, pairs=False)


def two_halves(t: Tensor, heads: int) -> Tensor:
    """Return rows that were pairs as two halves per head: the inverse of `interleaved`."""
    return _reordered(t, heads, pairs=True)


def _reordered(t: Tensor, heads: int, pairs: bool) -> Tensor:
    rows = t.shape[0]
    if not heads or rows % (2 * heads):
        raise BaseModelMismatchError(f"{rows} rows of q or k do not divide into {heads} heads of an even size.")
    half = rows // heads // 2
    shape = (heads, half, 2) if pairs else (heads, 2, half)
    order = np.arange(rows).reshape(shape).transpose(0, 2, 1).reshape(-1)
    return rearranged(t, lambda values: values[order], *t.shape)
