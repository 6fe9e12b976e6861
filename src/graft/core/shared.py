# SPDX-License-Identifier: Apache-2.0
"""The tensors that all layers of a model share. The tuner holds them once, in containers that each layer shows, too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from graft.core.call import Call
from graft.core.carrier import Carrier, State
from graft.core.containers import Attached, Slot, Transient, container_for, place_tensors, slots_of


class SharedTensors(Carrier):
    """The carrier of shared tensors: containers by name, each keyed by adapter."""

    key = ""
    keyed = True  # names in memory contain that of the adapter

    def __init__(self) -> None:
        self.state = State()
        self.containers: dict[str, Any] = {}  # "a.b": b within a module a
        self.parents: dict[str, nn.Module] = {}  # these modules
        self.never: dict[str, set[tuple[str, str]]] = {}  # by adapter: the tensors that never train
        self.files: dict[str, str] = {}  # see `Method.files`

    @property
    def call(self) -> Call | None:
        return self.state.call

    @property
    def adapters(self) -> list[str]:
        return list(dict.fromkeys(name for container in self.containers.values() for name in container))

    def hold(
        self,
        adapter: str,
        values: dict[str, object],
        where: tuple[torch.device | None, torch.dtype | None],
        upcast: bool,
        files: Mapping[str, str] = MappingProxyType({}),
        narrow: frozenset[str] = frozenset(),
    ) -> int:
        """Put the tensors that `Method.share` made into containers, frozen. Return how many of their numbers can train.

        where: device and dtype of the base weights.
        narrow: containers, or groups of them, that stay in that dtype.
        """
        self.files |= files
        slots = []
        for name, value in values.items():
            if name not in self.containers:
                self._open_container(name, value)
            container = self.containers[name]
            container[adapter] = value.tensor if isinstance(value, Transient) else value
            slots += list(slots_of(name, container, adapter))
            place_tensors(container, adapter, *where, upcast and name.partition(".")[0] not in narrow)
        self.never[adapter] = {(s.container, s.path) for s in slots if s.is_parameter and not s.trains}
        self.require_grad(adapter, False)
        return sum(slot.tensor.numel() for slot in self.slots(adapter) if slot.trains)

    def slots(self, adapter: str) -> list[Slot]:
        never = self.never.get(adapter, set())
        return [slot for name, c in self.containers.items() for slot in slots_of(name, c, adapter, never)]

    def drop(self, adapter: str) -> None:
        for container in self.containers.values():
            if adapter in container:
                del container[adapter]
        self.never.pop(adapter, None)

    def separate_buffers(self, adapter: str) -> list[tuple[Slot, Tensor]]:
        """Give an adapter its own buffers in place of those that it has from others, before a load writes to them.

        Return the slots, each with the other adapter's tensor. Buffers that no checkpoint holds stay.
        """
        separated = []
        for slot in self.slots(adapter):
            tensor = slot.tensor
            other_tensors = (t for name, t in slot.where.items() if name != slot.attribute)
            if slot.is_parameter or not slot.saved or tensor.is_meta or all(t is not tensor for t in other_tensors):
                continue
            slot.where[slot.attribute] = tensor.clone()
            separated.append((slot, tensor))
        return separated

    @staticmethod
    def rejoin_buffers(separated: Iterable[tuple[Slot, Tensor]]) -> None:
        """Take the others' tensors again where the load has brought the same values."""
        for slot, tensor in separated:
            if torch.equal(slot.tensor, tensor):
                slot.where[slot.attribute] = tensor

    def wrap_containers(self) -> dict[str, object]:
        """Return the containers in the form in which `Method.build` puts them on each layer."""
        return {name: Attached(container) for name, container in self.containers.items()}

    def _open_container(self, name: str, value: object) -> None:
        """Make a container for values like this one."""
        container = self.containers[name] = container_for(value)
        group, dot, inner = name.rpartition(".")
        if dot:
            self.parents.setdefault(group, nn.Module()).add_module(inner, container)

    def remove_containers(self, names: Iterable[str]) -> None:
        """Drop the containers that a failed injection made."""
        for name in list(names):
            del self.containers[name]
            group, dot, inner = name.rpartition(".")
            if dot:
                del self.parents[group]._modules[inner]

    def modules(self) -> dict[str, nn.Module]:
        containers = {name: c for name, c in self.containers.items() if isinstance(c, nn.Module) and "." not in name}
        return containers | self.parents


class TunerTensors(SharedTensors):
    """The same for one adapter of a model, whose modules stand on the tuner by their own names."""

    keyed = False

    def __init__(self, adapter: str, modules: dict[str, nn.Module]):
        super().__init__()
        for name, module in modules.items():
            self.containers[name] = container_for(module)
            self.containers[name][adapter] = module

    def modules(self) -> dict[str, nn.Module]:
        return {name: module for name, container in self.containers.items() for module in container.values()}
