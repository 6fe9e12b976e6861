# SPDX-License-Identifier: Apache-2.0
"""The conditions under which a hand-written backward pass pays."""

from __future__ import annotations

import torch
from torch import Tensor

from graft.kernels.eager import autocast_dtype, eager
from graft.kernels.low_rank import FUSED_FROM


def worth_it(x: Tensor) -> bool:
    """Say whether gradients are on, x has enough rows, and neither a compiler nor autocast changes the operations."""
    if not (torch.is_grad_enabled() and x.numel() >= FUSED_FROM * x.shape[-1]):
        return False
    return eager() and autocast_dtype(x.device) is None
