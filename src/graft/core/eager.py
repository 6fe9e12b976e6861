# SPDX-License-Identifier: Apache-2.0
"""Whether operations and modules do what is written and nothing more, so that short cuts past them are allowed."""

from __future__ import annotations

import torch
from torch import nn


def eager() -> bool:
    """Whether operations run as they are written: no compiler to fuse them, no functional transform."""
    return not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def unhooked(module: nn.Module) -> bool:
    """Whether calling a linear layer does nothing but its forward, so that its weight can be used without the call."""
    held = module.__dict__.get  # a lean module may have no dictionaries for hooks
    return not (
        held("_forward_hooks")
        or held("_forward_pre_hooks")
        or held("_backward_hooks")
        or held("_backward_pre_hooks")
        or held("forward")
    )
