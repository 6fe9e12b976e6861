# SPDX-License-Identifier: Apache-2.0
"""OLoRA: Orthonormal Low-Rank Adaptation, arXiv 2406.01775."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graft.methods.lora.start import Start


def start(lora: Any, W: Tensor) -> Start:
    """Return the first r columns and rows of W = Q R."""
    Q, R = torch.linalg.qr(W)
    return Start.of(R[: lora.cfg.r], Q[:, : lora.cfg.r], lora.scaling)
