# SPDX-License-Identifier: Apache-2.0
"""What a merge did to a weight: the size of the update, and what the dtype of storage has left of it."""

from __future__ import annotations

import math
from typing import Any

import torch

AT_ONCE = 2**18  # numbers: copies of a few rows, not of a weight


@torch.no_grad()
def measured(before: torch.Tensor, exact: torch.Tensor, stored: torch.Tensor) -> dict[str, Any]:
    """Compare a merged weight with the one that was asked for.

    Args:
        before: the weight without adapters.
        exact: W + ΔW in float32 or float64.
        stored: what the output holds.

    Returns:
        update: ‖ΔW‖; weight: ‖W‖; largest_difference, largest_relative_difference: of single numbers, stored against
        exact; unchanged: the share of the changed numbers that are stored as they were, since their change was below
        half a unit of the dtype; kept: the share of ΔW that is stored, <W' - W, ΔW> / ‖ΔW‖².
    """
    update = weight = largest = relative = kept = 0.0
    changed = lost = 0
    rows = max(1, AT_ONCE // max(1, exact[:1].numel())) if exact.dim() else 1
    for at in range(0, len(exact) if exact.dim() else 1, rows):
        cut = slice(at, at + rows) if exact.dim() else ...
        wanted = exact[cut].double()
        old, held = before[cut].double(), stored[cut].double()
        delta, error = wanted - old, (held - wanted).abs()
        update += float(delta.square().sum())
        weight += float(old.square().sum())
        kept += float(((held - old) * delta).sum())
        largest = max(largest, float(error.max()))
        relative = max(relative, float((error / wanted.abs().clamp_min(torch.finfo(torch.float32).tiny)).max()))
        moves = delta != 0
        changed += int(moves.sum())
        lost += int((moves & (held == old.to(stored.dtype).double())).sum())
    return {
        "update": math.sqrt(update),
        "weight": math.sqrt(weight),
        "largest_difference": largest,
        "largest_relative_difference": relative,
        "unchanged": lost / changed if changed else 0.0,
        "kept": kept / update if update else 1.0,
    }
