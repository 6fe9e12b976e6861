# SPDX-License-Identifier: Apache-2.0
"""The tensors that all layers of a model share.

The tuner holds them once, in containers that each layer shows as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from graft.core.call import Call
from graft.core.carrier import Carrier, CarrierState
from graft.core.containers import Attached, Slot, Transient, container_for, iter_slots, place_tensors


class SharedTensors(Carrier):
    """The carrier of shared tensors: containers by name, each with one entry per adapter."""

    key = ""
    keyed = True  # names in memory contain that of the adapter

    def __init__(self) -> None:
        self.state = CarrierState()
        self.containers: dict[str, Any] = {}  # "a.b": b is within a module a
        self.parents: dict[str, nn.Module] = {}  # the modules "a" of such names
        self.never: dict[str, set[tuple[str, str]]] = {}  # by adapter: the tensors that never train
        self.files: dict[str, str] = {}  # see `Method.files`

    @property
    def call(self) -> Call | None:
        """Return the call object of the model, which `state` holds; None before the tuner sets it."""
        return self.state.call

    @property
    def adapters(self) -> list[str]:
        """Return the names of all adapters with an entry in a container, each once, in the order of the containers."""
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
        """Put the values that `Method.share` returned into containers, frozen.

        Return how many of their numbers can train.

        Makes a container for each new name, and moves the values to their device and dtype. Parameters that do not
        require gradients are noted as never trainable.

        Args:
            adapter: its values replace those that it had.
            where: device and dtype of the base weights.
            upcast: trained values in half precision become float32.
            files: names in files, added to those of other adapters (`Method.files`).
            narrow: containers, or modules around them, with values that keep the base's dtype.
        """
        self.files |= files
        slots = []
        for name, value in values.items():
            if name not in self.containers:
                self._open_container(name, value)
            container = self.containers[name]
            container[adapter] = value.tensor if isinstance(value, Transient) else value
            slots += list(iter_slots(name, container, adapter))
            place_tensors(container, adapter, *where, upcast and name.partition(".")[0] not in narrow)
        self.never[adapter] = {(s.container, s.path) for s in slots if s.is_parameter and not s.trains}
        self.require_grad(adapter, False)
        return sum(slot.tensor.numel() for slot in self.slots(adapter) if slot.trains)

    def slots(self, adapter: str) -> list[Slot]:
        """Return the slots of an adapter's tensors in all containers."""
        never = self.never.get(adapter, set())
        return [slot for name, c in self.containers.items() for slot in iter_slots(name, c, adapter, never)]

    def drop(self, adapter: str) -> None:
        """Delete an adapter from all containers, and forget its tensors that never train. Containers stay.

        Nothing happens if it has no entry.
        """
        for container in self.containers.values():
            if adapter in container:
                del container[adapter]
        self.never.pop(adapter, None)

    def separate_buffers(self, adapter: str) -> list[tuple[Slot, Tensor]]:
        """Clone each buffer of an adapter that is the same tensor as another adapter's, so that a load may write to it.

        Returns pairs of the slot and the tensor that was in it. Parameters, buffers that no file holds, and tensors on
        the meta device stay as they are.
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
        """Put the former tensor back into each slot that now holds an equal one.

        `separated`: from `separate_buffers`.
        """
        for slot, tensor in separated:
            if torch.equal(slot.tensor, tensor):
                slot.where[slot.attribute] = tensor

    def wrap_containers(self) -> dict[str, object]:
        """Return each container by name, wrapped in `Attached`, as `Method.build` puts it on a layer."""
        return {name: Attached(container) for name, container in self.containers.items()}

    def _open_container(self, name: str, value: object) -> None:
        """Make an empty container that fits `value`, and store it under `name`.

        For a name "a.b", also add it as child b to the module `parents["a"]`, which is made if it is missing.
        """
        container = self.containers[name] = container_for(value)
        group, dot, inner = name.rpartition(".")
        if dot:
            self.parents.setdefault(group, nn.Module()).add_module(inner, container)

    def remove_containers(self, names: Iterable[str]) -> None:
        """Delete these containers, also from their parent modules. For the containers that a failed injection made."""
        for name in list(names):
            del self.containers[name]
            group, dot, inner = name.rpartition(".")
            if dot:
                del self.parents[group]._modules[inner]

    def modules(self) -> dict[str, nn.Module]:
        """Return the modules that the tuner registers: containers that are modules and have no dot in their name, and
        `parents`.

        The entries of `parents` are keys next to those of the modules.
        """
        containers = {name: c for name, c in self.containers.items() if isinstance(c, nn.Module) and "." not in name}
        return containers | self.parents


class TunerTensors(SharedTensors):
    """Shared tensors of one adapter.

    Their modules are attributes of the tuner by their own names, without the adapter's.
    """

    keyed = False

    def __init__(self, adapter: str, modules: dict[str, nn.Module]):
        """Make a container for each module in `modules`, with that module as the entry of `adapter`."""
        super().__init__()
        for name, module in modules.items():
            self.containers[name] = container_for(module)
            self.containers[name][adapter] = module

    def modules(self) -> dict[str, nn.Module]:
        """Return each module by its container's name."""
        return {name: module for name, container in self.containers.items() for module in container.values()}
