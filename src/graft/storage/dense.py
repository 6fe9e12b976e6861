# SPDX-License-Identifier: Apache-2.0
"""A weight held as a plain tensor."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Dense:
    name = "dense"
    reads = exact = live = True

    def read(self, m: nn.Module, name: str = "weight") -> Tensor:
        return getattr(m, name)

    def fixed(self, m: nn.Module, name: str = "weight") -> str | None:
        t: Tensor | None = m._parameters.get(name)
        if t is None:
            t = m._buffers.get(name)
        if t is None:
            return (
                f"its {name} is computed from other tensors: make it one of its own first, with torch's "
                "parametrize.remove_parametrizations, remove_weight_norm or prune.remove"
            )
        if t.is_meta:
            return f"its {name} is on the meta device, not loaded or offloaded: have the model on real devices first"
        return None

    def write(self, m: nn.Module, name: str, W: Tensor, shared: bool = False) -> nn.Module | None:
        """In place, unless the weight is tied to another module: then this one gets a weight of its own."""
        p = getattr(m, name)
        if shared:
            setattr(m, name, nn.Parameter(W.contiguous(), requires_grad=p.requires_grad))
        else:
            p.data.copy_(W)
        return None

    def snapshot(self, m: nn.Module, name: str = "weight", shared: bool = False):
        p = getattr(m, name)
        return p if shared else p.detach().clone()

    def restore(self, m: nn.Module, name: str, state) -> None:
        if isinstance(state, nn.Parameter):  # tie again
            setattr(m, name, state)
        else:
            getattr(m, name).data.copy_(state)

    def where(self, m: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        p = m._parameters.get("weight")
        if p is None:
            p = getattr(m, "weight", None)
        if p is None:
            p = next(m.parameters(), None)
        if p is None:
            return None, None
        return p.device, p.dtype if p.is_floating_point() else None

    def protect(self, y: Tensor) -> Tensor:
        return y
