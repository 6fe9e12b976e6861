# SPDX-License-Identifier: Apache-2.0
"""The store of one parameter of a module, below the layers of other parameters of that module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from graft.core.carrier import carrier_of
from graft.core.site import Store


def innermost(module: Any) -> nn.Module:
    """Return the base model's module beneath all layers on it."""
    while (carrier := carrier_of(module)) is not None:
        module = carrier.base_module
    return module  # type: ignore[no-any-return]


class Within:
    """Does as another store, on the innermost module. `where` says where the one parameter is."""

    def __init__(self, store: Store, parameter: str):
        self.store, self.parameter = store, parameter
        self.name, self.live, self.exact = store.name, store.live, store.exact

    def unread(self, m, name):
        return self.store.unread(innermost(m), name)

    def fixed(self, m, name):
        return self.store.fixed(innermost(m), name)

    def at_hand(self, layer, written):
        return self.store.at_hand(layer, written)

    def read(self, m, name):
        return self.store.read(innermost(m), name)

    def write(self, m, name, W, shared):
        return self.store.write(innermost(m), name, W, shared)

    def kept(self, m, name, state):
        return self.store.kept(innermost(m), name, state)

    def snapshot(self, m, name, shared):
        return self.store.snapshot(innermost(m), name, shared)

    def restore(self, m, name, state):
        self.store.restore(innermost(m), name, state)

    def where(self, m) -> tuple[torch.device | None, torch.dtype | None]:
        p = innermost(m)._parameters.get(self.parameter)
        if p is None:
            return self.store.where(innermost(m))
        return self.store.where(innermost(m))[0] if p.is_meta else p.device, p.dtype if p.is_floating_point() else None

    def protect(self, y):
        return self.store.protect(y)
