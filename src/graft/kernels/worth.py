# SPDX-License-Identifier: Apache-2.0
"""When a hand-written backward pass pays, and what dropout it can take over."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graft.core.eager import eager
from graft.core.lean import Identity
from graft.kernels.low_rank import FUSED_FROM


def worth_it(x: Tensor) -> bool:
    """Whether gradients may be wanted, of enough rows, where neither a compiler nor autocast changes the operations."""
    if not (torch.is_grad_enabled() and x.numel() >= FUSED_FROM * x.shape[-1]):
        return False
    return eager() and not torch.is_autocast_enabled(x.device.type)


def share_dropped(dropout: nn.Module) -> float | None:
    """The share of inputs that a method's dropout takes out now; None of a module that has to be called."""
    if type(dropout) in (Identity, nn.Identity):
        return 0.0
    if type(dropout) is not nn.Dropout:
        return None
    return dropout.p if dropout.training else 0.0
