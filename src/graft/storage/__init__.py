# SPDX-License-Identifier: Apache-2.0
"""The stores: how modules hold weights. Only files in this folder look inside a module for its weight."""

from typing import Any

import torch
from torch import nn

from graft.core.site import Store
from graft.core.table import TypeTable
from graft.storage.dense import Dense
from graft.storage.offload import standalone
from graft.storage.packed import is_packed

DENSE: Store = Dense()
STORES: TypeTable[Store] = TypeTable({})  # by a module's type
TENSORS: TypeTable[Store] = TypeTable({})  # by a tensor's type, for modules that STORES does not know
PLAIN = (torch.Tensor, nn.Parameter)


def find_store(module: nn.Module, name: str = "weight") -> Store:
    """Return the store of a module's tensor: that of the module's type, else of the tensor's type, else DENSE."""
    store = STORES.find(type(module))
    if store is None:
        kind = type(module._parameters.get(name))
        store = TENSORS.find(kind) if kind not in PLAIN else None
    return store or DENSE


def place_of(module: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    """Return device and dtype of the first weight in a module; if offloaded, the device on which it computes."""
    first = next((m for m in module.modules() if any(p is not None for p in m._parameters.values())), module)
    return find_store(first).where(first)


def numel(p: Any) -> int:
    """Return how many numbers a parameter holds: two in a byte if packed to 4 bits, all shards with DeepSpeed."""
    n = p.numel() or getattr(p, "ds_numel", 0)
    if is_packed(p):
        n *= 2 * torch.empty((), dtype=getattr(p, "quant_storage", torch.uint8)).element_size()
    return n


__all__ = ["DENSE", "STORES", "TENSORS", "Dense", "find_store", "numel", "place_of", "standalone"]
