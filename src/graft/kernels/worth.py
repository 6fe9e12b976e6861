# SPDX-License-Identifier: Apache-2.0
"""When a hand-written backward pass pays."""

from __future__ import annotations

import torch
from torch import Tensor

from graft.kernels.eager import autocast_dtype, eager
from graft.kernels.low_rank import FUSED_FROM


def worth_it(x: Tensor) -> bool:
    """Whether gradients may be wanted, of enough rows, where neither a compiler nor autocast changes the operations."""
    if not (torch.is_grad_enabled() and x.numel() >= FUSED_FROM * x.shape[-1]):
        return False
    return eager() and autocast_dtype(x.device) is None
