# SPDX-License-Identifier: Apache-2.0
"""When a hand-written backward pass pays, and what dropout it can take over."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graft.core.eager import autocast_dtype, eager, unhooked, watched
from graft.core.lean import Identity
from graft.kernels.low_rank import FUSED_FROM


def worth_it(x: Tensor) -> bool:
    """Whether gradients may be wanted, of enough rows, where neither a compiler nor autocast changes the operations."""
    if not (torch.is_grad_enabled() and x.numel() >= FUSED_FROM * x.shape[-1]):
        return False
    return eager() and autocast_dtype(x.device) is None


def share_dropped(dropout: nn.Module) -> float | None:
    """The share of inputs that a method's dropout takes out now; None of a module that has to be called: one that is
    not torch's, has hooks, drops everything, or whose draws a dispatch mode has to see."""
    kind = type(dropout)
    if not unhooked(dropout) or kind not in (Identity, nn.Identity, nn.Dropout):
        return None
    if kind is not nn.Dropout or not dropout.training or not dropout.p:
        return 0.0
    return None if dropout.p == 1 or watched() else dropout.p  # type: ignore[return-value]
