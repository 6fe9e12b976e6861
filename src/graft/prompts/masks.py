# SPDX-License-Identifier: Apache-2.0
"""Attention masks with the columns, and rows, of a prompt in front: pure functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def widened(
    mask: Any, prompt: int, total: int, before: int, window: int | None, cuts: bool, causal: bool, covered: bool
) -> Any:
    """Return the mask with the prompt's tokens.

    Args:
        mask: (batch, tokens), or (batch, heads, queries, tokens) of numbers to add or of truth values.
        prompt: how many tokens the prompt has.
        total: how many tokens there are with it.
        before: how many of the prompt's are in front of the input of this call.
        window: how many tokens back the layers with this mask see; None: to the beginning.
        cuts: the cache of these layers holds no more than the window.
        causal: tokens see only those before them.
        covered: the mask may have columns for the prompt already.

    Raises:
        ValueError: the mask is of another number of tokens.
    """
    tokens = total - prompt
    if isinstance(mask, Tensor) and mask.dim() == 2:
        if covered and mask.shape[1] == total:
            return mask
        if mask.shape[1] != tokens:
            raise ValueError(
                f"attention_mask has {mask.shape[1]} columns for {tokens} tokens (and the prompt's "
                f"{prompt}, which it need not cover)."
            )
        return torch.cat([mask.new_ones(len(mask), prompt), mask], dim=1)
    if not isinstance(mask, Tensor) or mask.shape[-1] != tokens:
        return mask
    open_, shut = (0, torch.finfo(mask.dtype).min) if mask.is_floating_point() else (1, 0)
    b, h, q, k = mask.shape
    if before:
        own = mask.new_full((), shut) if causal else mutual(mask, shut)
        mask = torch.cat([own.expand(b, h, before, k), mask], dim=-2)
    rows = before + q
    at = torch.arange(total, device=mask.device)
    back = at[total - rows :, None] - at[:prompt]
    sees = (back >= 0) & (back < (window or total)) if causal else torch.ones_like(back, dtype=torch.bool)
    front = torch.full_like(back, shut, dtype=mask.dtype).masked_fill(sees, open_)
    mask = torch.cat([front.expand(b, h, rows, -1), mask], dim=-1)
    return mask[..., 1 - window - rows :] if window and cuts else mask


def mutual(mask: Tensor, shut: float) -> Tensor:
    """Return which tokens the prompt may see, (batch, heads, 1, tokens): all that some token sees, but none that sees
    a token which does not see it, as those after a prefix do."""
    sees = mask != shut
    later = (sees & ~sees.transpose(-1, -2)).any(-1)
    return mask.amax(-2, keepdim=True).masked_fill(later[..., None, :], shut)
