# SPDX-License-Identifier: Apache-2.0
"""The stores: how modules hold weights. Only files in this folder look inside a module for its weight."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from graft.core.errors import PeftWarning, warn
from graft.core.ops import OPS, Linear, Op, replaced_forward
from graft.core.pieces import Piece
from graft.core.site import Store
from graft.core.table import TypeTable
from graft.storage import (
    aqlm,
    bnb,
    bnb_embedding,
    calibrated,
    compressed,
    engine,
    float8,
    hqq,
    integers,
    megatron,
    quanto,
    tensor_parallel,
    torchao,
)
from graft.storage.compressed import Compressed
from graft.storage.dense import NUMBERS, PLAIN, Dense, strange_tensor
from graft.storage.engine import Engine
from graft.storage.foreign import ByIdentity, Foreign, Packed
from graft.storage.megatron import Megatron
from graft.storage.packed import is_packed
from graft.storage.parallel import is_sharded
from graft.storage.quantized import Quantized
from graft.storage.tensor_parallel import TensorParallel, standalone, style_of
from graft.storage.within import Within, innermost

DENSE: Store = Dense()
FOREIGN: Store = Foreign()
PACKED: Store = Packed()
TENSOR_PARALLEL: Store = TensorParallel()
MEGATRON: Store = Megatron()
STORES: TypeTable[Store] = TypeTable(dict.fromkeys(megatron.KINDS.names(), MEGATRON))  # by a module's type
TENSORS: TypeTable[Store] = TypeTable(
    {"transformer_engine.pytorch.tensor.float8_tensor.Float8Tensor": Engine()}
)  # by a tensor's type, for modules that STORES does not know
FILES: tuple[Any, ...] = (  # of packed weights
    bnb,
    bnb_embedding,
    torchao,
    hqq,
    quanto,
    calibrated,
    aqlm,
    float8,
    integers,
)

for file in FILES:
    for row, kept_so in getattr(file, "TENSORS", {}).items():
        TENSORS.add(row, kept_so)
    for row, kept_so in getattr(file, "MODULES", {}).items():
        STORES.add(row, kept_so)
        OPS.add(row, getattr(file, "OPS", {}).get(row) or Linear())


def find_store(module: nn.Module) -> Store:
    """Return the store of a module's weight: that of the module's type, else of the weight's type, else DENSE.

    A weight that its module may use in a way of its own, or that is no plain tensor, is never DENSE but FOREIGN; so is
    what a layer that is known to be linear has in place of one.
    """
    store = marked(module) or STORES.find(type(module))
    if store is not None:
        return store
    return FOREIGN if replaced_forward(module) is not None else of_tensor(module, "weight")


def marked(module: nn.Module) -> Store | None:
    """Return the store of a module that a package has marked as its own, whatever its type; None for others."""
    held = module.__dict__
    for mark, store in compressed.MARKS.items():
        if mark in held:
            return store
    return None


def find_tensor_store(module: nn.Module, name: str) -> Store:
    """Return the store of one tensor of a module that computes, itself, with what is put in the tensor's place."""
    own = STORES.find(type(module))
    store = of_tensor(module, name) if own is None else own
    return Within(PACKED if store is FOREIGN or isinstance(own, Quantized) else store, name)


def of_tensor(module: nn.Module, name: str) -> Store:
    t = module._parameters.get(name)
    kind = type(t)
    if kind in PLAIN and t.dtype in NUMBERS:  # type: ignore[union-attr]  # most are, and there are many
        return DENSE
    if t is not None and is_sharded(t) and style_of(module) is not None:
        return TENSOR_PARALLEL
    return TENSORS.find(kind) or (DENSE if strange_tensor(module, name) is None else FOREIGN)


def ready(modules: Iterable[nn.Module]) -> None:
    """Have the stores of packed weights mend what would make adapters on or below these modules wrong."""
    said: dict[str | None, None] = {}
    for m in modules:
        store = marked(m) or STORES.find(type(m))
        if store is None and (weight := m._parameters.get("weight")) is not None and type(weight) not in PLAIN:
            store = TENSORS.find(type(weight))
        if isinstance(store, (Quantized, Compressed)):
            said[store.ready(m)] = None
    for what in said:
        if what is not None:
            warn(what, PeftWarning)


def holds_codes(m: nn.Module) -> bool:
    """Say whether a module's weight is packed: codes and scales, whatever the module is called."""
    own = STORES.find(type(m))
    return strange_tensor(m, "weight") is not None if own is None else isinstance(own, Quantized)


def codes_in(module: nn.Module) -> str | None:
    """Say why a copy of a module cannot train: a weight on it or below it is held in codes. None if none is."""
    for m in filter(holds_codes, module.modules()):
        own = STORES.find(type(m))
        if not (isinstance(own, Quantized) and own.trains(m)):
            return f"the weight of a {type(m).__name__} is held in codes, which cannot train"
    return None


def loose_bias(module: nn.Module) -> bool:
    """Say whether a layer with a packed weight has a bias that is no Parameter."""
    bias = getattr(module, "bias", None)
    loose = isinstance(bias, Tensor) and not isinstance(bias, nn.Parameter)
    return loose and isinstance(STORES.find(type(module)), Quantized)


def hold_bias(module: nn.Module) -> tuple[nn.Parameter, Callable[[], None]]:
    """Make a layer's bias a Parameter, so that it can train; return it, and what undoes this."""
    owner: Any = module._buffers if "bias" in module._buffers else module.__dict__
    before = owner.pop("bias")
    bias = module._parameters["bias"] = nn.Parameter(before.detach(), requires_grad=False)

    def undo() -> None:
        del module._parameters["bias"]
        owner["bias"] = before

    return bias, undo


def piece_of(module: nn.Module, op: Op) -> Piece | None:
    """Return the piece of a layer's work that this process does, where it does not do all."""
    return tensor_parallel.piece_of(module, op) or megatron.piece_in(module, op)


def group_of(module: nn.Module) -> Any:
    """Return the group of processes that compute a module in pieces; None for another module."""
    if megatron.KINDS.find(type(module)) is not None:
        return None if megatron.cut_of(module) is None else megatron.group_of(module)
    return tensor_parallel.group_of(module)


def refusal(module: nn.Module, op: Op, inside: bool) -> str | None:
    """Say why a module that processes share cannot be adapted; None if nothing of the kind keeps it from that.

    inside: the adapter knows what happens inside the module.
    """
    why = megatron.why_not(module) or engine.why_not(module)
    return tensor_parallel.refusal(module, op, inside) if why is None else f"As a {type(module).__name__}, {why}"


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


__all__ = [
    "DENSE",
    "FOREIGN",
    "PACKED",
    "STORES",
    "TENSORS",
    "ByIdentity",
    "Dense",
    "Quantized",
    "codes_in",
    "find_store",
    "find_tensor_store",
    "group_of",
    "hold_bias",
    "holds_codes",
    "innermost",
    "loose_bias",
    "numel",
    "of_tensor",
    "piece_of",
    "place_of",
    "ready",
    "refusal",
    "standalone",
]
