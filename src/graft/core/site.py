# SPDX-License-Identifier: Apache-2.0
"""A Site, one place to adapt, and the protocol of a Store, which holds weights."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graft.core.ops import Op


class Store(Protocol):
    """The way in which a module holds its weight: dense, 4-bit, sharded, …"""

    name: str
    live: bool  # `read` gives the tensor itself, and the core may add to it in place
    exact: bool  # writing and reading back loses nothing, so that subtraction takes an update out again

    def why_unreadable(self, m: nn.Module, name: str) -> str | None: ...  # why a call cannot read this tensor, if so
    def why_unwritable(self, m: nn.Module, name: str) -> str | None: ...  # why merging cannot read and write it, if so
    def bring_in(self, layer: Any, written: nn.Module | None) -> AbstractContextManager[None]: ...
    def read(self, m: nn.Module, name: str) -> Tensor: ...
    def write(self, m: nn.Module, name: str, W: Tensor, shared: bool) -> nn.Module | None: ...
    def snapshot_values(self, m: nn.Module, name: str, state: Any) -> Tensor: ...  # the values of a snapshot
    def snapshot(self, m: nn.Module, name: str, shared: bool) -> Any: ...
    def restore(self, m: nn.Module, name: str, state: Any) -> None: ...
    def where(self, m: nn.Module, name: str) -> tuple[torch.device | None, torch.dtype | None]: ...
    def protect(self, y: Tensor) -> Tensor: ...


@dataclass(slots=True)
class Weight:
    """A tensor of a module, bound as it is now: who keeps one misses that another module comes in the place of this."""

    module: nn.Module
    name: str
    op: Op
    store: Store
    shared: bool = False  # tied to another module

    def why_unreadable(self) -> str | None:
        return self.store.why_unreadable(self.module, self.name)

    def why_unwritable(self) -> str | None:
        return self.store.why_unwritable(self.module, self.name)

    def bring_in(self, layer: object, writes: bool = False) -> AbstractContextManager[None]:
        return self.store.bring_in(layer, self.module if writes else None)

    def read(self) -> Tensor:
        """Return the tensor as the module stores it."""
        return self.store.read(self.module, self.name)

    def canon(self) -> Tensor:
        return self.op.canon(self.store.read(self.module, self.name))

    def write(self, W: Tensor) -> nn.Module | None:
        """Write a canonical weight; return a module that has to take the place of this one, if so."""
        return self.store.write(self.module, self.name, self.op.uncanon(W), self.shared)

    def snapshot_values(self, state: object) -> Tensor:
        return self.store.snapshot_values(self.module, self.name, state)

    def snapshot(self) -> Any:
        return self.store.snapshot(self.module, self.name, self.shared)

    def restore(self, state: object) -> None:
        self.store.restore(self.module, self.name, state)

    def where(self) -> tuple[torch.device | None, torch.dtype | None]:
        return self.store.where(self.module, self.name)


@dataclass
class Site:
    """One module (and one of its parameters) that can take an adapter, and the facts that a method may ask for."""

    key: str  # path in the model: of the module, or of a parameter that is a target itself
    module: nn.Module
    op: Op
    store: Store
    parameter: str = "weight"
    shared: bool = False  # the weight is tied to another module
    path: str = ""  # of the module; "": as `key`
    is_read: bool = False  # modules around it read weight and bias, and compute with them
    is_called: bool = True  # False: nobody calls the module
    piece: Any = None  # of the module's work, where this process does not do all of it
    experts: Any = None  # the `ExpertBlock` of a stack, if graft can run the module with updates of the stack
    out_features: int = field(init=False)  # or channels
    in_features: int = field(init=False)  # or channels; `fan_in` counts the kernel as well
    shape: tuple[int, ...] = field(init=False)  # canonical: (out, in / groups, *kernel)

    def __post_init__(self) -> None:
        self.measure()

    def measure(self) -> None:
        self.out_features, self.in_features = self.op.dims(self.module)
        self.shape = tuple(self.op.shape(self.module))
        self.path = self.path or self.key

    def move(self, module: nn.Module, op: Op, store: Store) -> None:
        """Have another module hold the same values."""
        self.module, self.op, self.store = module, op, store
        self.measure()

    @property
    def weight(self) -> Weight:
        return Weight(self.module, self.parameter, self.op, self.store, self.shared)

    @property
    def is_stack(self) -> bool:
        """True if the weight is a stack of matrices, (n, out, in), such as those of experts."""
        return self.op.opaque and len(self.shape) > 2

    @property
    def fan_in(self) -> int:
        return prod(self.shape[1:])

    @property
    def multiplies_vectors(self) -> bool:
        """Return True if a matrix multiplies the inputs: they are no ids, and no channels of a convolution."""
        return len(self.shape) == 2 and not self.op.takes_ids

    @property
    def adapts_tensor(self) -> bool:
        """Return True if what is adapted is a tensor, and not a call of the module."""
        return self.op.opaque or not self.is_called

    @property
    def on_meta(self) -> bool:
        """Return True if there is no weight yet, so that values for it would be lost."""
        device = self.weight.where()[0]
        return device is not None and device.type == "meta"

    @property
    def type_name(self) -> str:
        return type(self.module).__name__
