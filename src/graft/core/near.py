# SPDX-License-Identifier: Apache-2.0
"""Tensors of a model on the devices of layers that are elsewhere: a model may be spread over several."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from graft.kernels.eager import eager, watched

# {tensor: {device: (its version, copy)}}; copies go when the tensor does, and no copy or file of the model holds them
COPIES = WeakTensorKeyDictionary()


def near(t: Tensor, device: torch.device) -> Tensor:
    """Return `t` on `device`: itself, or a copy, which is kept until other values are written to `t`.

    No copy of a parameter is kept, and gradients flow to it.
    """
    if t.device == device:
        return t
    if isinstance(t, nn.Parameter) or t.requires_grad or t.is_inference() or not eager() or watched():
        return t.to(device)
    copies: dict[torch.device, tuple[int, Tensor]] = COPIES.setdefault(t, {})
    version, copy = copies.get(device, (-1, t))
    if version != t._version:
        with torch.inference_mode(False):  # or training could not use it
            copy = t.to(device)
        copies[device] = t._version, copy
    return copy
