# SPDX-License-Identifier: Apache-2.0
"""How weights are held. Only files in this folder look inside a module for its weight."""

from typing import Any

import torch
from torch import nn

from graft.core.site import Store
from graft.core.table import TypeTable
from graft.storage.dense import Dense
from graft.storage.offload import standalone
from graft.storage.packed import is_packed

DENSE: Store = Dense()
STORES: TypeTable[Store] = TypeTable({})  # by type of module
TENSORS: TypeTable[Store] = TypeTable({})  # by type of the weight itself, of modules that the first does not know
PLAIN = (torch.Tensor, nn.Parameter)


def find_store(module: nn.Module, name: str = "weight") -> Store:
    """The Store of a module's tensor: by the module's type, then by the tensor's; dense unless a row says otherwise."""
    store = STORES.find(type(module))
    if store is None:
        kind = type(module._parameters.get(name))
        store = TENSORS.find(kind) if kind not in PLAIN else None
    return store or DENSE


def place_of(module: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    """Where its first weight is, or is brought to for each call; and its dtype."""
    first = next((m for m in module.modules() if any(p is not None for p in m._parameters.values())), module)
    return find_store(first).where(first)


def numel(p: Any) -> int:
    """How many numbers a parameter holds: packed 4-bit weights two in a byte, DeepSpeed's shards those of the whole."""
    n = p.numel() or getattr(p, "ds_numel", 0)
    if is_packed(p):
        n *= 2 * torch.empty((), dtype=getattr(p, "quant_storage", torch.uint8)).element_size()
    return n


__all__ = ["DENSE", "STORES", "TENSORS", "Dense", "find_store", "numel", "place_of", "standalone"]
