# SPDX-License-Identifier: Apache-2.0
"""Steps on packed weights that keep no dense copy for the backward pass, but read and compute again there.

Where the weight is a plain tensor, autograd keeps that tensor itself. Of a packed one `read` makes a dense copy, and
what is computed from it is as large: kept for each layer, these take several times the memory that packing saves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from graft.core.effect import Effect, LowRank, Update
from graft.core.face import Layer
from graft.kernels.eager import eager


def forms(effect: Effect) -> bool:
    """Say whether what an adapter adds is computed from a tensor as large as the weight."""
    if isinstance(effect, LowRank):
        return effect.of_weight and not effect.gains
    return isinstance(effect, Update) and effect.delta is not None and effect.branch is None


def again(layer: Layer, run: Callable[..., Tensor], *args: Any) -> Tensor:
    """Return run(*args); compute it again in the backward pass."""
    if not (torch.is_grad_enabled() and eager()):
        return run(*args)
    out: Tensor = checkpoint(run, *args, use_reentrant=False, preserve_rng_state=layer.training)
    return out
