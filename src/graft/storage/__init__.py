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
STORES: TypeTable[Store] = TypeTable({})


def find_store(module) -> Store:
    """The Store of a module's weight; dense unless a table row says otherwise."""
    return STORES.find(type(module)) or DENSE


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


__all__ = ["DENSE", "STORES", "Dense", "find_store", "numel", "place_of", "standalone"]
