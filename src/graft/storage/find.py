# SPDX-License-Identifier: Apache-2.0
"""Which store a module's weight has: by a mark on the module, its class, or the class of the weight."""

from __future__ import annotations

import torch
from torch import nn

from graft.core.carrier import carrier_of
from graft.core.ops import OPS, Linear, TypeTable, find_replaced_forward
from graft.core.site import Store
from graft.storage import aqlm, bnb, calibrated, compressed, float8, hqq, integers, megatron, quanto, stacks, torchao
from graft.storage.dense import NUMBERS, PLAIN, Dense, strange_tensor
from graft.storage.engine import Engine
from graft.storage.experts import PACKED_STACK
from graft.storage.foreign import Foreign, Packed
from graft.storage.fsdp2 import Sharded, is_managed
from graft.storage.megatron import Megatron
from graft.storage.parallel import is_sharded
from graft.storage.quantized import Quantized
from graft.storage.tensor_parallel import TensorParallel, style_of


def innermost(module: nn.Module) -> nn.Module:
    """Return the base model's module beneath all layers of adapters on it; the module itself if it has none."""
    while (carrier := carrier_of(module)) is not None:
        module = carrier.base_module
    return module


DENSE: Store = Dense()
FOREIGN: Store = Foreign()
PACKED: Store = Packed()
TENSOR_PARALLEL: Store = TensorParallel()
SHARDED: Store = Sharded()
MEGATRON: Store = Megatron()
STORES: TypeTable[Store] = TypeTable(dict.fromkeys(megatron.KINDS.names(), MEGATRON))  # by a module's type
# by a tensor's type, for modules that STORES does not know
TENSORS: TypeTable[Store] = TypeTable({"transformer_engine.pytorch.tensor.float8_tensor.Float8Tensor": Engine()})
# the files of packed weights
for file in (bnb, torchao, hqq, quanto, calibrated, aqlm, float8, integers):
    for row, store in getattr(file, "TENSORS", {}).items():
        TENSORS.add(row, store)
    for row, store in getattr(file, "MODULES", {}).items():
        STORES.add(row, store)
        OPS.add(row, getattr(file, "OPS", {}).get(row) or Linear())


def find_store(module: nn.Module) -> Store:
    """Return the store of a module's weight: by a mark on the module, else its class, else the weight's class, else
    DENSE.

    For a class that graft does not know it is FOREIGN, not DENSE, if the module has a replaced forward, or if the
    weight is no plain tensor.
    """
    store = find_marked_store(module) or STORES.find(type(module))
    if store is not None:
        return store
    return FOREIGN if find_replaced_forward(module) is not None else find_store_of_tensor(module, "weight")


def find_marked_store(module: nn.Module) -> Store | None:
    """Return the store of a module that a package has marked by an attribute in `MARKS` of `compressed`, whatever its
    type; None for others.

    The attribute has to be in the instance's `__dict__`; its value does not matter.
    """
    attributes = module.__dict__
    for mark, store in compressed.MARKS.items():
        if mark in attributes:
            return store
    return None


def find_tensor_store(module: nn.Module, name: str) -> Store:
    """Return the store of one parameter of a module that uses it directly, such as a stack of experts.

    A packed stack gets PACKED_STACK. A parameter of a module with a quantized store, or of a strange class, gets
    PACKED: a replacement could not hold its codes. Others get the store of the module's class or of the parameter.
    """
    if stacks.find_stack_class(module, name) is not None:
        return PACKED_STACK
    module_store = STORES.find(type(module))
    store = find_store_of_tensor(module, name) if module_store is None else module_store
    return PACKED if store is FOREIGN or isinstance(module_store, Quantized) else store


def find_store_of_tensor(module: nn.Module, name: str) -> Store:
    """Return the store of a module's parameter by its class, its dtype, and how processes share it; the module's class
    does not count.

    One of floats with 16 to 64 bits that FSDP2 has sharded gets SHARDED, also while it is whole. A plain tensor of such
    floats gets DENSE. A DTensor in a module with a style of tensor parallelism gets TENSOR_PARALLEL. Others get the
    store for their class, if there is one. The rest gets FOREIGN, unless the tensor behaves like a plain one or the
    module has none: then DENSE.
    """
    t = module._parameters.get(name)
    kind = type(t)
    if t is not None and is_managed(module, name) and t.dtype in NUMBERS:
        return SHARDED
    if kind in PLAIN and t.dtype in NUMBERS:  # type: ignore[union-attr]  # most are, and there are many
        return DENSE
    if t is not None and is_sharded(t) and style_of(module) is not None:
        return TENSOR_PARALLEL
    return TENSORS.find(kind) or (DENSE if strange_tensor(module, name) is None else FOREIGN)


def find_device_and_dtype(module: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    """Return device and dtype of the weight of the first module with a parameter, in `module` or below it, by its
    store.

    Without a parameter anywhere the store of `module` itself answers: it may know buffers or another attribute
    `weight`. For an offloaded module it is the device that the module computes on. Each is None if it is not known.
    """
    first = next((m for m in module.modules() if any(p is not None for p in m._parameters.values())), module)
    return find_store(first).where(first, "weight")
