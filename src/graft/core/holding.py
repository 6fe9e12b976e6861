# SPDX-License-Identifier: Apache-2.0
"""The tensors and facts that a host holds for its adapters: containers under PEFT's names, keyed by adapter, and the
slots of the tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from graft.core.carrier import CarrierState
from graft.core.containers import (
    FACTS,
    UPCAST,
    AnyDict,
    Attached,
    BufferDict,
    Slot,
    Transient,
    can_hold,
    container_for,
    iter_slots,
    make_facts_class,
    place_tensor,
    store_value,
)
from graft.core.lean import ModuleDict
from graft.core.method import Method
from graft.core.site import Site, Store

Where = tuple[torch.device | None, torch.dtype | None]
MODELESS = (nn.Linear, nn.Identity)  # modules that act the same in training and evaluation


class Holding:
    """The part of a host that holds tensors in containers, and facts (numbers, texts, True, None) in dicts."""

    containers: list[str]  # all names, also those of facts
    holders: list[str]  # the names of containers that are modules
    attached: set[str]  # names of containers that belong to the model, and that layers share
    scaling: dict[str, float]  # by adapter, if its method has a scaling
    scaling_at_start: dict[str, float]
    state: CarrierState
    methods: dict[str, Method]  # by adapter
    kinds: list[type]  # config classes of the methods, in the order of their first adapter
    inner_name: str
    store: Store
    site: Site
    _modules: dict[str, Any]

    def hold(self, method: Method, values: dict[str, Any]) -> None:
        """Store the values that `Method.build` returned by container name; after an error some are stored.

        - A fact (exactly a float, int, bool, str or None) goes into a dict; a new dict refuses changes unless the
          method computes with it (`computes_with`). So does a value of another kind that is no tensor, into a plain
          dict.
        - An `Attached` module of the model becomes a child of the layer, unless the name exists or has a dot.
          `Attached` facts become an attribute.
        - A tensor or module goes into the container of its name, made or widened to an `AnyDict` as needed. A module
          gets the base layer's training mode; but an `nn.Linear` or `nn.Identity` without children and buffers is in
          training mode if the adapter may train.

        Afterwards sets missing attributes from `Method.empty` and the slots in `state.slots`. If the method moves its
        tensors, `check_slots` checks them. A "scaling" is noted in `scaling_at_start`.

        Raises:
            TypeError: a value is an array of another package, a name is used for facts and for tensors, or
                `check_slots` refuses a tensor.
        """
        adapter, computes_with = method.name, method.computes_with
        slots: list[Slot] = []
        attributes, modules, known = self.__dict__, self._modules, self.containers
        training = modules[self.inner_name].training
        for key, value in values.items():
            kind = type(value)
            if kind in FACTS:
                if key not in known:
                    facts = {adapter: value}
                    attributes[key] = facts if key in computes_with else make_facts_class(key)(facts)
                    known.append(key)
                elif key in modules:
                    raise self._name_conflict(method, key, kind)
                else:
                    dict.__setitem__(attributes[key], adapter, value)
                continue
            if kind is Attached:  # a container of the whole model
                if not isinstance(value.container, nn.Module):  # facts of the whole model
                    attributes[key] = value.container
                elif key not in modules and "." not in key:  # containers of a group are attributes of the tuner alone
                    modules[key] = value.container
                    self.attached.add(key)
                continue
            is_module = isinstance(value, nn.Module)
            if not is_module and hasattr(value, "__array__") and not isinstance(value, Tensor):
                raise TypeError(
                    f"'{key}' of adapter '{adapter}' on layer '{self.site.key}' is a {kind.__name__}, which graft "
                    "cannot move or save. Return a tensor from build(), by torch.from_numpy()."
                )
            if key not in known:
                self._open_container(key, value, training)
            container: Any = modules[key] if key in modules else attributes[key]
            if not ((is_module and type(container) is ModuleDict) or can_hold(container, value)):
                if isinstance(container, dict) or not (is_module or isinstance(value, (Tensor, Transient))):
                    raise self._name_conflict(method, key, kind)
                container = self._widen_container(key, container)
            if isinstance(container, dict):
                self.set_facts(adapter, **{key: value})
                continue
            if not is_module or type(container) is AnyDict:
                store_value(container, adapter, value)
            else:
                container._modules[adapter] = value
                if not value._modules and not value._buffers:
                    trains = not (training or method.cfg.inference_mode) and isinstance(value, MODELESS)
                    value.__dict__["training"] = training or trains
                    by_adapter, where = container._modules, value._parameters
                    for name, p in where.items():
                        if p is not None:
                            slots.append(
                                Slot(key, name, value, name, where, True, p.requires_grad, True, by_adapter, value)
                            )
                    continue
                value.train(training)
            slots += iter_slots(key, container, adapter)
        for key, container in method.empty.items():
            if key not in modules and key not in attributes:
                attributes[key] = container
        self.state.slots[adapter] = slots
        if method.moves:
            check_slots(method, self.site.key, slots)
        if "scaling" in values:
            self.scaling_at_start[adapter] = values["scaling"]

    def set_facts(self, adapter: str, **facts: object) -> None:
        """Set facts of an adapter, by name, in the layer's dicts, also those that refuse changes by users.

        Raises KeyError for a name without a dict.
        """
        for key, value in facts.items():
            dict.__setitem__(self.__dict__[key], adapter, value)

    def _name_conflict(self, method: Method, key: str, kind: type) -> TypeError:
        """Return the error for a name under which this adapter has facts and another one tensors, or the other way
        round.
        """
        other_adapters = ", ".join(f"'{name}'" for name in self.methods)
        return TypeError(
            f"'{key}' of {type(method).__name__} adapter '{method.name}' on layer '{self.site.key}' is a "
            f"{kind.__name__}, and of other adapters there ({other_adapters}) something else: facts and tensors "
            "cannot share a name. Let build() return it under another."
        )

    def _open_container(self, key: str, value: object, training: bool) -> None:
        """Make an empty container for values like `value` under the name `key`, as a child module or, for facts, an
        attribute.

        A module replaces an attribute of this name (`Method.empty`) and gets the training mode `training`. The name is
        appended to `containers`, and a module's name to `holders`.
        """
        container = container_for(value)
        self.containers.append(key)
        if isinstance(container, nn.Module):
            self.__dict__.pop(key, None)  # an empty attribute of `Method.empty`
            self._modules[key] = container
            self.holders.append(key)
            container.__dict__["training"] = training
        else:
            self.__dict__[key] = container

    def close_containers(self, number: int) -> None:
        """Remove all containers but the first `number`, for an injection that failed.

        Nothing checks that they are empty.

        Attributes that the remaining methods expect (`Method.empty`) come back.
        """
        for key in self.containers[number:]:
            if self._modules.pop(key, None) is None:
                del self.__dict__[key]
            else:
                self.holders.remove(key)
        del self.containers[number:]
        for method in self.methods.values():
            for key, container in method.empty.items():
                if key not in self._modules:
                    self.__dict__.setdefault(key, container)

    def _widen_container(self, key: str, container: nn.ModuleDict | nn.ParameterDict | BufferDict) -> AnyDict:
        """Replace a container of the layer by an `AnyDict` with the same entries, since methods use its name for
        different kinds of values. Return the `AnyDict`.

        The slots of all adapters in this container are replaced as well; parameters that never train stay so.
        """
        wider = self._modules[key] = AnyDict(container)
        for name, slots in self.state.slots.items():
            moved = iter(iter_slots(key, wider, name, {(s.container, s.path) for s in slots if not s.trains}))
            self.state.slots[name] = [next(moved) if s.container == key else s for s in slots]
        return wider

    @property
    def where(self) -> Where:
        """The device and dtype of the base weight, by the store; each None if unknown."""
        return self.store.where(self._modules[self.inner_name], self.site.parameter)

    def place_adapter(self, adapter: str, where: Where, upcast: bool = True) -> int:
        """Move the tensors of a new adapter to a device and dtype, freeze it, and return how many numbers of it can
        train.

        Tensors on meta stay there, as do all tensors of a method that does not move them. Floating tensors are cast to
        the dtype. Half precision is then widened to float32 if `upcast`, unless the method keeps the base's dtype for
        their container. Parameters that never train are not counted.

        Args:
            where: of the base weight, as `self.where`.
        """
        device, dtype = where
        method = self.methods[adapter]
        narrow = method.keeps_base_dtype
        widens = upcast and dtype in UPCAST
        size = 0
        for slot in self.state.slots[adapter]:  # new slots, which are valid
            t = slot.tensor
            if slot.trains:
                size += t.numel()
                t.requires_grad = False
            if method.moves and (widens or t.dtype != dtype or (t.device != device and not t.is_meta)):
                place_tensor(slot.owner, slot.attribute, device, dtype, upcast and slot.container not in narrow)
        return size

    def drop_values(self, adapter: str) -> None:
        """Remove the tensors, facts, slots and scaling at the start of an adapter; those that it lacks are ignored.

        Empty containers stay.
        """
        attributes = self.__dict__
        modules = attributes["_modules"]
        for key in attributes["containers"]:
            container = modules.get(key)
            if container is None:
                dict.pop(attributes[key], adapter, None)  # `ReadOnlyFacts` refuses other ways
            elif type(container) is ModuleDict:  # its methods would take as long as the rest of the loop
                container._modules.pop(adapter, None)
            elif adapter in container:
                del container[adapter]
        attributes["state"].slots.pop(adapter, None)
        attributes["scaling_at_start"].pop(adapter, None)

    def slots(self, adapter: str) -> list[Slot]:
        """Return the slots of an adapter's tensors; [] for an adapter that the layer lacks.

        The slots of last time are returned, as the same list, if their modules are still in place and have the tensors.
        Else they are looked up and noted in `state.slots` again, as after a module was replaced or pruned. Parameters
        that never train are known from the old slots. While a merged adapter's module replaces the base layer, and old
        slots do not fit, the slots are those of that module, and not noted.
        """
        slots: list[Slot] = self.state.slots.get(adapter, [])
        for slot in slots:
            if slot.by_adapter.get(adapter) is not slot.root or slot.attribute not in slot.where:
                break
        else:
            return slots
        m = self.methods.get(adapter)
        if m is not None and adapter in self.state.merged and m.effect.whole:  # the two modules are swapped
            module = ModuleDict({adapter: self.state.uncast or self._modules[self.inner_name]})
            return list(iter_slots(m.layer_names[0], module, adapter))
        never = {(slot.container, slot.path) for slot in slots if slot.is_parameter and not slot.trains}
        slots = [slot for key in self.holders for slot in iter_slots(key, self._modules[key], adapter, never)]
        self.state.slots[adapter] = slots
        return slots

    def tensors(self, adapter: str, transient: bool = False) -> Iterator[tuple[Slot, Tensor]]:
        """Yield (slot, tensor) for each tensor of an adapter that a checkpoint contains.

        transient: yield the others, too.
        """
        for slot in self.slots(adapter):
            if slot.saved or transient:
                yield slot, slot.tensor

    def first_tensor(self, adapter: str) -> Tensor:
        """Return the first tensor of an adapter, which gives its dtype and device.

        Slots are looked up again if its module was replaced. Raises KeyError for an adapter that the layer lacks,
        IndexError for one without tensors.
        """
        slot = self.state.slots[adapter][0]
        tensor: Tensor | None = slot.where.get(slot.attribute)
        if tensor is None or slot.by_adapter.get(adapter) is not slot.root:
            tensor = self.slots(adapter)[0].tensor
        return tensor


def check_slots(method: Method, layer: str, slots: list[Slot]) -> None:
    """Check the tensors that `build` of a method returned for a layer.

    Of two faults the later one in this list is raised.

    Raises:
        TypeError: a tensor for files has a name without the method's prefix, there is no tensor, or the first tensor,
            which gives the adapter's dtype, has no floating numbers.
    """
    why = ""
    prefix = method.prefix
    for slot in slots:
        if slot.saved and not slot.container.startswith(prefix):
            why = (
                f"names a tensor '{slot.container}': names of tensors in files begin with '{prefix}', the method's "
                "prefix. Rename it"
            )
    if not slots:
        why = "returns no tensor. Return one at least (a frozen one, if nothing trains there)"
    elif not slots[0].tensor.is_floating_point():
        why = (
            f"begins with '{slots[0].container}' of {slots[0].tensor.dtype}: the first tensor gives the adapter's "
            "dtype. Return one of floating numbers before it"
        )
    if why:
        of = f"{type(method).__name__} for adapter '{method.name}' on layer '{layer}'"
        raise TypeError(f"build() of {of} {why}.")
