# SPDX-License-Identifier: Apache-2.0
"""The tensors that a layer holds for its adapters: containers by PEFT's names, keyed by adapter, and slots in them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from graft.core.containers import FACTS, AnyDict, Attached, Slot, Transient, container_for, slots_of, takes
from graft.core.lean import ModuleDict
from graft.core.place import UPCAST, place_tensor
from graft.core.site import Site, Store

Where = tuple[torch.device | None, torch.dtype | None]
MODELESS = (nn.Linear, nn.Identity)  # modules that do the same in training and evaluation: in the mode of their adapter


class Holding:
    """The part of an AdapterLayer that holds tensors, and facts (plain numbers and the like) in dicts beside them."""

    containers: list[str]  # all names, those of facts too
    holders: list[str]  # those of them that are modules
    attached: set[str]  # names of containers that belong to the model, not to this layer
    scaling: dict[str, float]  # by adapter, of methods that have one
    scaling_at_start: dict[str, float]
    state: Any  # LayerState
    methods: dict[str, Any]  # Method by adapter
    kinds: list[Any]
    store: Store
    site: Site
    _modules: dict[str, Any]

    def begin_holding(self) -> None:
        self.__dict__.update(containers=[], holders=[], attached=set(), scaling_at_start={})

    def hold(self, method: Any, values: dict[str, Any]) -> None:
        """Put the values that `Method.build` returned into containers."""
        adapter = method.name
        slots: list[Slot] = []
        own, modules, known = self.__dict__, self._modules, self.containers
        training = modules["base_layer"].training
        mixed = any(kind is not method.config for kind in self.kinds)
        for key, value in values.items():
            kind = type(value)
            if kind in FACTS:
                if key in known:
                    own[key][adapter] = value
                else:
                    own[key] = {adapter: value}
                    known.append(key)
                continue
            if kind is Attached:  # the container itself, of the whole model, stands here
                if not isinstance(value.container, nn.Module):  # plain facts of the whole model
                    own[key] = value.container
                elif key not in modules and "." not in key:  # those of a group stand on the tuner alone
                    modules[key] = value.container
                    self.attached.add(key)
                continue
            if hasattr(value, "__array__") and not isinstance(value, Tensor):
                raise TypeError(
                    f"'{key}' of adapter '{adapter}' on layer '{self.site.key}' is a {kind.__name__}, which nothing "
                    "moves or saves: let build() return a tensor, by torch.from_numpy()."
                )
            if key not in known:
                self._open(key, value, training)
            container: Any = modules[key] if key in modules else own[key]
            if mixed and not takes(container, value):
                container = self._widen(key, container)
            if type(container) is AnyDict:
                container[adapter] = value
                slots += slots_of(key, container, adapter)
                continue
            if isinstance(value, nn.Module):
                container._modules[adapter] = value
                if not value._modules and not value._buffers:
                    trains = not (training or method.cfg.inference_mode) and isinstance(value, MODELESS)
                    value.__dict__["training"] = training or trains
                    held, where = container._modules, value._parameters
                    for name, p in where.items():
                        if p is not None:
                            slots.append(Slot(key, name, value, name, where, True, p.requires_grad, True, held, value))
                else:
                    value.train(training)
                    slots += slots_of(key, container, adapter)
                continue
            container[adapter] = value.tensor if isinstance(value, Transient) else value
            slots += slots_of(key, container, adapter)
        for key, container in method.empty.items():
            if key not in modules and key not in own:
                own[key] = container
        self.state.slots[adapter] = slots
        if "scaling" in values:
            self.scaling_at_start[adapter] = values["scaling"]

    def _open(self, key: str, value: Any, training: bool) -> None:
        """Make a container for values like this one."""
        container = container_for(value)
        self.containers.append(key)
        if isinstance(container, nn.Module):
            self.__dict__.pop(key, None)  # an empty one of `Method.empty`
            self._modules[key] = container
            self.holders.append(key)
            container.__dict__["training"] = training
        else:
            self.__dict__[key] = container

    def _widen(self, key: str, container: Any) -> AnyDict:
        """Make a container hold anything: methods of two kinds call different things by its name."""
        wider = self._modules[key] = AnyDict(container)
        for name, slots in self.state.slots.items():
            moved = iter(slots_of(key, wider, name, {(s.container, s.path) for s in slots if not s.trains}))
            self.state.slots[name] = [next(moved) if s.container == key else s for s in slots]
        return wider

    @property
    def where(self) -> Where:
        """Device and dtype of the base weight."""
        return self.store.where(self._modules["base_layer"])

    def place(self, adapter: str, where: Where, upcast: bool = True) -> int:
        """Move a new adapter to a device and dtype, those of the base weight; half precision to float32 if `upcast`.

        Freeze it. Return how many of its numbers can train.
        """
        device, dtype = where
        method = self.methods[adapter]
        upcast, narrow = upcast and method.upcast, method.narrow
        widens = upcast and dtype in UPCAST
        size = 0
        for slot in self.state.slots[adapter]:  # as they were just made
            t = slot.tensor
            if slot.trains:
                size += t.numel()
                t.requires_grad = False
            if widens or t.dtype != dtype or (t.device != device and not t.is_meta):
                place_tensor(slot.owner, slot.attribute, device, dtype, upcast and slot.container not in narrow)
        return size

    def let_go(self, adapter: str) -> None:
        """Drop an adapter's tensors and facts."""
        own = self.__dict__
        modules = own["_modules"]
        for key in own["containers"]:
            container: Any = modules.get(key)
            if container is None:
                own[key].pop(adapter, None)
            elif type(container) is ModuleDict:  # past its own methods, which take as long as all the rest
                container._modules.pop(adapter, None)
            elif adapter in container:
                del container[adapter]
        own["state"].slots.pop(adapter, None)
        own["scaling_at_start"].pop(adapter, None)

    def slots(self, adapter: str) -> list[Slot]:
        """Return the slots in which its tensors stand now; look them up again after a module is replaced or pruned."""
        slots: list[Slot] = self.state.slots.get(adapter, [])
        for slot in slots:
            if slot.held.get(adapter) is not slot.root or slot.attribute not in slot.where:
                break
        else:
            return slots
        place = self.place_of_whole(adapter)
        if place is not None:  # its module and the base layer have changed places
            return list(slots_of(place, ModuleDict({adapter: self._modules["base_layer"]}), adapter))
        never = {(slot.container, slot.path) for slot in slots if slot.is_parameter and not slot.trains}
        slots = [slot for key in self.holders for slot in slots_of(key, self._modules[key], adapter, never)]
        self.state.slots[adapter] = slots
        return slots

    def place_of_whole(self, adapter: str) -> str | None:
        """Return the container in which the base layer stands while the adapter's module stands in its place."""
        m = self.methods.get(adapter)
        return m.layer_names[0] if m is not None and adapter in self.state.merged and m.effect.whole else None

    def tensors(self, adapter: str, transient: bool = False) -> Iterator[tuple[Slot, Tensor]]:
        """Yield the slots of all tensors in a checkpoint, with the tensors. transient: and of those not in it."""
        for slot in self.slots(adapter):
            if slot.saved or transient:
                yield slot, slot.tensor

    def first_tensor(self, adapter: str) -> Tensor:
        slot = self.state.slots[adapter][0]
        tensor: Tensor | None = slot.where.get(slot.attribute)
        if tensor is None or slot.held.get(adapter) is not slot.root:
            tensor = self.slots(adapter)[0].tensor
        return tensor
