# SPDX-License-Identifier: Apache-2.0
"""A Site, one place to adapt, the Weight of a module, and the protocol of a Store, which holds weights."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graft.core.ops import Op, is_stock


class Store(Protocol):
    """How a module holds its weight: dense, 4-bit, sharded, … Each function gets the module `m` and the tensor's name
    in it.
    """

    name: str
    live: bool  # `read` gives the tensor itself, and the core may add to it in place
    in_parts: bool  # this process has a part of each tensor of the module, the bias too
    exact: bool  # writing and reading back loses nothing, so that subtraction takes an update out again

    def why_unreadable(self, m: nn.Module, name: str) -> str | None:
        """Return why a call cannot read the tensor `name` of `m`; None if it can. A declaration only."""

    def why_unwritable(self, m: nn.Module, name: str) -> str | None:
        """Return why merging cannot read and write the tensor; None if it can. A declaration only."""

    def why_tied_unwritable(self, name: str) -> str | None:
        """Return why merging cannot write a tensor that is tied to another module; None if it can.

        A declaration only.
        """

    def bring_in(self, layer: Any, written: nn.Module | None) -> AbstractContextManager[None]:
        """Return a context that makes the tensors of the layer present, such as gathered or loaded. A declaration only.

        written: the module with tensors that the block changes; the context keeps the changes.
        """

    def read(self, m: nn.Module, name: str) -> Tensor:
        """Return the dense tensor in the module's orientation, with gradients where it trains. A declaration only."""

    def write(self, m: nn.Module, name: str, W: Tensor, shared: bool) -> None:
        """Write W, in the module's orientation, into the module. A declaration only.

        shared: another module is tied to the tensor and must keep its values.
        """

    def snapshot_values(self, m: nn.Module, name: str, state: Any) -> Tensor:
        """Return the tensor of a snapshot, dense and in the module's orientation. A declaration only."""

    def snapshot(self, m: nn.Module, name: str, shared: bool) -> Any:
        """Return the tensor in a form for `restore`: a copy, or the parameter itself if it is shared.

        A declaration only.
        """

    def restore(self, m: nn.Module, name: str, state: Any) -> None:
        """Give the tensor the values of a snapshot again. A declaration only."""

    def where(self, m: nn.Module, name: str) -> tuple[torch.device | None, torch.dtype | None]:
        """Return device and dtype of the tensor, each None if unknown. A declaration only."""

    def protect(self, y: Tensor) -> Tensor:
        """Return y, an output of the module, or a copy of it if rows may not be written to y. A declaration only."""


@dataclass(slots=True)
class Weight:
    """A tensor of a module, with the Op and Store that know how to use it.

    A Weight keeps the module that it was made with, so do not keep one where a layer may exchange its module.
    """

    module: nn.Module
    name: str
    op: Op
    store: Store
    shared: bool = False  # tied to another module

    def why_unreadable(self) -> str | None:
        """Return the store's reason why a call cannot read this tensor; None if it can."""
        return self.store.why_unreadable(self.module, self.name)

    def why_unwritable(self) -> str | None:
        """Return the store's reason why merging cannot read and write this tensor, a tied one included; None if it
        can.
        """
        why = self.store.why_unwritable(self.module, self.name)
        return self.store.why_tied_unwritable(self.name) if why is None and self.shared else why

    def bring_in(self, layer: object, writes: bool = False) -> AbstractContextManager[None]:
        """Return the store's context that makes the tensors of `layer` present, such as gathered or loaded.

        `writes`: the block changes the module's tensors, and the store keeps the changes.
        """
        return self.store.bring_in(layer, self.module if writes else None)

    def read(self) -> Tensor:
        """Return the tensor as the store reads it: dense, in the module's orientation."""
        return self.store.read(self.module, self.name)

    def canon(self) -> Tensor:
        """Return the tensor as the store reads it, in canonical orientation: (out, in, *kernel)."""
        return self.op.canon(self.store.read(self.module, self.name))

    def write(self, W: Tensor) -> None:
        """Write W, canonical, into the module by the store, in the module's orientation.

        Modules tied to the tensor keep its values.
        """
        self.store.write(self.module, self.name, self.op.uncanon(W), self.shared)

    def snapshot_values(self, state: object) -> Tensor:
        """Return the tensor of a snapshot, dense and in the module's orientation, by the store."""
        return self.store.snapshot_values(self.module, self.name, state)

    def snapshot(self) -> Any:
        """Return the store's snapshot of the tensor, for `restore`: a copy, or the parameter itself if it is tied."""
        return self.store.snapshot(self.module, self.name, self.shared)

    def restore(self, state: object) -> None:
        """Give the tensor the values of a snapshot again, by the store."""
        self.store.restore(self.module, self.name, state)

    def where(self) -> tuple[torch.device | None, torch.dtype | None]:
        """Return device and dtype of the tensor by the store, each None if unknown."""
        return self.store.where(self.module, self.name)


@dataclass
class Site:
    """One module, and one parameter of it, that can take an adapter; with the facts that a method may use."""

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
    is_stack: bool = field(init=False)  # the weight is a stack of matrices, (n, out, in), as of experts

    def __post_init__(self) -> None:
        """Read `out_features` and `in_features` from the module by the op's `dims`, and `shape`, canonical, by its
        `shape`.

        `is_stack` becomes True for an opaque op with more than two dimensions. An empty `path` becomes `key`.
        """
        self.out_features, self.in_features = self.op.dims(self.module)
        self.shape = tuple(self.op.shape(self.module))
        self.is_stack = self.op.opaque and len(self.shape) > 2
        self.path = self.path or self.key

    @property
    def output_is_new(self) -> bool:
        """True if the module runs a known forward with a plain weight, so that adapters may overwrite its output."""
        return self.op.output_is_new and self.store.exact and is_stock(self.module)

    @property
    def weight(self) -> Weight:
        """A new Weight of the present module and parameter, with the site's op, store and `shared`."""
        return Weight(self.module, self.parameter, self.op, self.store, self.shared)

    @property
    def fan_in(self) -> int:
        """Return the number of inputs of one output: in / groups times the size of the kernel."""
        return prod(self.shape[1:])

    @property
    def multiplies_vectors(self) -> bool:
        """Return True if a matrix multiplies the inputs: the weight has two dimensions, and the inputs are no ids."""
        return len(self.shape) == 2 and not self.op.takes_ids

    @property
    def adapts_tensor(self) -> bool:
        """Return True if the adapted object is a tensor and not a call of the module: an opaque Op, or nobody calls the
        module.
        """
        return self.op.opaque or not self.is_called

    @property
    def on_meta(self) -> bool:
        """Return True if the weight is on the meta device, so that values for it would be lost."""
        device = self.weight.where()[0]
        return device is not None and device.type == "meta"

    @property
    def type_name(self) -> str:
        """Return the class name of the module."""
        return type(self.module).__name__
