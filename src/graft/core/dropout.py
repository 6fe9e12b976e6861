# SPDX-License-Identifier: Apache-2.0
"""The dropout of a method: its module, and whether a hand-written backward pass can take it over."""

from __future__ import annotations

from torch import nn

from graft.core.lean import Identity
from graft.kernels.eager import has_no_hooks, watched


def dropout_for(share: float) -> nn.Module:
    """Return a module that drops this share of its input in training; one that does nothing for 0."""
    return nn.Dropout(share) if share > 0 else nn.Identity()


def share_dropped(dropout: nn.Module) -> float | None:
    """Return the share of inputs that a method's dropout takes out now. None for a module that the layer has to call:
    one that is not torch's, has hooks, drops everything, or whose draws a dispatch mode has to see."""
    kind = type(dropout)
    if not has_no_hooks(dropout) or kind not in (Identity, nn.Identity, nn.Dropout):
        return None
    if kind is not nn.Dropout or not dropout.training or not dropout.p:
        return 0.0
    return None if dropout.p == 1 or watched() else dropout.p
