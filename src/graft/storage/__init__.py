# SPDX-License-Identifier: Apache-2.0
"""How weights are held. Only files in this folder look inside a module for its weight."""

from graft.core.site import Store
from graft.core.table import TypeTable
from graft.storage.dense import Dense

DENSE: Store = Dense()
STORES: TypeTable[Store] = TypeTable({})


def find_store(module) -> Store:
    """The Store of a module's weight; dense unless a table row says otherwise."""
    return STORES.find(type(module)) or DENSE


__all__ = ["DENSE", "STORES", "Dense", "find_store"]
