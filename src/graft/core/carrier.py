# SPDX-License-Identifier: Apache-2.0
"""Activation, training and deletion of adapters, common to all objects that hold adapter tensors: layers, wrappers of
heads, prompts, tensors that all layers share. It also checks lists of adapter names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from graft.core.call import Call
from graft.core.containers import Attached, Slot, Transient, container_for, iter_slots, place_tensors
from graft.core.errors import warn
from graft.core.gate import all_adapters, changes


def as_name_list(names: str | Iterable[str], argument: str) -> list[str]:
    """Return a list of names: `[names]` for one string, else `check_name_list(names, argument)` with its errors."""
    return [names] if isinstance(names, str) else check_name_list(names, argument)


def check_name_list(names: Iterable[str], argument: str) -> list[str]:
    """Return a new list of the names in `names`. `argument` is the caller's name for them, for errors.

    Raises:
        TypeError: `names` is a string, or holds an item that is no string.
        ValueError: a name is in it twice.
    """
    if isinstance(names, str):
        raise TypeError(f"{argument} should be a list of strings, got {names!r}. Write ['{names}'].")
    names = list(names)
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise TypeError(f"{argument} takes names of adapters, got {wrong[0]!r} of type {type(wrong[0]).__name__}.")
    repeats = sorted({name for name in names if names.count(name) > 1})
    if repeats:
        raise ValueError(f"{argument} holds {repeats} twice, and an adapter acts once. Name each adapter one time.")
    return names


class CarrierState:
    """The state of a carrier that changes when adapters are switched.

    It is a plain object, since setting an attribute of a module takes ten times as long.
    """

    def __init__(self, call: Call | None = None) -> None:
        self.call = call  # may disable adapters
        self.active: list[str] = []
        self.weights: tuple[float, ...] | None = None  # one per active adapter, if they act as an average
        self.apart = False  # each active adapter acts on its own rows, which a call names
        self.disabled = False
        self.trainable: Sequence[str] = ()  # adapters that require gradients
        self.slots: dict[str, list[Slot]] = {}  # by adapter, of layers: valid while each slot's module is the same
        self.merged: list[str] = []  # adapters that the base weight contains
        self.uncast: nn.Module | None = None  # a merged replacement, if the base layer became a copy in other dtypes
        self.undo: list[tuple[str, Any, Tensor | None]] = []  # (kind, state of the weight, the bias) of each merge
        self.survived: list[Tensor] = []  # of each merge that rounded the weight: see `core/finite.py`

    def set_trainable(self, adapter: str, on: bool) -> bool:
        """Set `requires_grad` of an adapter's parameters to `on`, except for those that never train.

        Returns False, possibly after some were set, if `slots` lacks the adapter, or if a module or tensor there was
        replaced or removed. The caller then looks the slots up again.
        """
        try:
            for slot in self.slots[adapter]:
                if slot.trains:
                    if slot.by_adapter[adapter] is not slot.root:
                        return False
                    slot.where[slot.attribute].requires_grad = on
        except KeyError:
            return False
        return True


class Carrier:
    """Base of all objects that hold adapters.

    A subclass defines the names of its adapters (`adapters`), the slots of their tensors (`slots`), how to remove one
    (`drop`), and how to react to other active adapters (`refresh_plan`).
    """

    state: CarrierState
    key: str  # path in the model
    inner_name: str  # name of the child that leads to the base model's module
    claim: str  # verb of messages: "it {claim} adapter(s) ['a']"
    takes_rows = False  # single rows of the module train
    beside = False  # added with an adapter that acts on other modules
    adapter_layer: Any = None  # the layer that does its work
    replaces = True  # it replaces a module of the base model
    base_module: nn.Module  # that module
    remainder: nn.Module  # the module that unloading puts back

    @property
    def merged_adapters(self) -> list[str]:
        """Return a new empty list: nothing merges here. Layers override it."""
        return []

    @property
    def adapters(self) -> list[str]:
        """Raise NotImplementedError here; a subclass returns the names of its adapters."""
        raise NotImplementedError

    def slots(self, adapter: str) -> Sequence[Slot]:
        """Raise NotImplementedError here; a subclass returns the present slots of an adapter's tensors."""
        raise NotImplementedError

    def drop(self, adapter: str) -> None:
        """Raise NotImplementedError here.

        A subclass removes the tensors of an adapter, and leaves the lists of active and trainable adapters alone.
        """
        raise NotImplementedError

    def check_active(self, names: Sequence[str]) -> None:
        """Raise an error if these adapters cannot be active together on this carrier.

        Does nothing here; subclasses override it.
        """

    def end_merge(self, names: list[str]) -> None:
        """Unmerge before `names` become active. Does nothing here; layers override it."""

    def refresh_plan(self) -> None:
        """Update the computation after a change of the active adapters. Does nothing here; layers override it."""

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters, as stored in the state.

        Layers also list active adapters that they do not hold.
        """
        return self.state.active

    @property
    def active_adapter(self) -> str | list[str]:
        """The name of the active adapter if exactly one is active, else the list of active adapters."""
        active = self.active_adapters
        return active[0] if len(active) == 1 else active

    # PEFT's names for `adapters`, which other packages read

    @property
    def _adapters(self) -> set[str]:
        """A new set of the adapter names, under PEFT's name."""
        return set(self.adapters)

    def _get_available_adapters(self) -> set[str]:
        """Return the set of adapter names, under PEFT's name."""
        return set(self.adapters)

    def _all_available_adapter_names(self) -> list[str]:
        """Return the sorted list of adapter names, under PEFT's name."""
        return sorted(self.adapters)

    @property
    def disable_adapters(self) -> bool:
        """True if this carrier's adapters are switched off, or if the present call or thread has all adapters
        disabled.
        """
        state = self.state
        return state.disabled or (state.call is not None and state.call.off)

    def parameters_of(self, adapter: str) -> Iterator[nn.Parameter]:
        """Yield the parameters of an adapter, without its buffers, and with parameters that never train.

        Yields nothing for an adapter that is not here.
        """
        for slot in self.slots(adapter):
            if slot.is_parameter:
                yield slot.tensor  # type: ignore[misc]

    def require_grad(self, adapter: str, requires_grad: bool) -> None:
        """Set `requires_grad` of an adapter's parameters.

        Leaves those that never train, and those in a flat parameter of FSDP. The list of trainable adapters stays as it
        is.
        """
        for slot in self.slots(adapter):
            if slot.trains and not slot.is_in_flat_parameter:
                slot.tensor.requires_grad = requires_grad

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Set `requires_grad` of the parameters of one or several adapters, and update the list of trainable adapters.

        A name that trains moves to the end of the list. Ignores names of adapters that this carrier lacks, and
        parameters that never train. Raises the errors of `check_name_list` for bad names.
        """
        adapters = self.adapters
        for name in as_name_list(adapter_names, "set_requires_grad"):
            if name in adapters:
                self.require_grad(name, requires_grad)
                trainable = [n for n in self.state.trainable if n != name]
                self.state.trainable = [*trainable, name] if requires_grad else trainable

    @changes(all_adapters)
    def set_adapter(self, adapters: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make `adapters` (a name or names) the active ones, in this order, and the only trainable ones.

        With `inference_mode`, none trains.

        For more than one name, first raises an error if `check_active` finds that they cannot be active together. Then
        a layer with other adapters merged warns and unmerges them. Runs as a change of the model: waits until its calls
        have ended.

        Raises:
            TypeError, ValueError: `adapters` is no list of names, has one twice, or they cannot act together here.
            InUseError: calls of the model do not end in time.
        """
        names = as_name_list(adapters, "set_adapter")
        if len(names) > 1:
            self.check_active(names)
        self.end_merge(names)
        self.activate(names, not inference_mode)

    def activate(
        self, names: list[str], train: bool, weights: tuple[float, ...] | None = None, apart: bool = False
    ) -> None:
        """Make adapters active, without the check of `set_adapter`, and call `refresh_plan`.

        Adapters that trained and are not among `names` are frozen, as is every one if `train` is False. `names` itself
        becomes the list of active adapters, with names that the carrier lacks; with `train` also that of the trainable
        ones, else (). `weights` and `apart` are stored in the state.

        Args:
            train: let these adapters train.
            weights: the weights of an average, one per name.
            apart: each active adapter acts on its own rows, which a call names.
        """
        state, on = self.state, names if train else ()
        for name in state.trainable:
            if name not in on and not state.set_trainable(name, False):
                self.require_grad(name, False)
        for name in on:
            if not state.set_trainable(name, True):
                self.require_grad(name, True)
        state.active, state.trainable, state.weights, state.apart = names, on, weights, apart
        self.refresh_plan()

    def enable_adapters(self, enabled: bool) -> None:
        """Set `disabled` of the state to `not enabled`, and call `refresh_plan`.

        Merged adapters stay merged, and no gate is taken.
        """
        self.state.disabled = not enabled
        self.refresh_plan()

    def forget(self, adapter: str) -> None:
        """Remove an adapter's tensors (`drop`) and its name from the lists of trainable and active adapters.

        If the adapter was active, the weights of an average are removed too, and `refresh_plan` is called.
        """
        self.drop(adapter)
        state = self.state
        if adapter in state.trainable:
            state.trainable = [a for a in state.trainable if a != adapter]
        if adapter in state.active:
            state.active, state.weights = [a for a in state.active if a != adapter], None
            self.refresh_plan()

    @changes(all_adapters)
    def delete_adapter(self, adapter: str, new_active_adapters: list[str] | None = None) -> None:
        """Forget an adapter. If it was active, activate `new_active_adapters` and let them train.

        If that is None, the remaining active adapters stay active and train; if none remains, the first other adapter
        by name becomes active, with a warning. Runs as a change of the model: waits until its calls have ended. Nothing
        is checked: an active adapter that this carrier does not hold is forgotten and replaced in the same way.
        """
        before = self.active_adapters
        self.forget(adapter)
        if adapter in before:
            if new_active_adapters is None:
                new_active_adapters = active_after_deletion(adapter, before, self.adapters)
            self.set_adapter(new_active_adapters)


C = TypeVar("C", bound=Carrier)


def iter_carried(carriers: Iterable[C], names: Sequence[str] | None = None) -> Iterator[tuple[C, str]]:
    """Yield (carrier, name) for each carrier and each of `names` that it holds.

    names: None takes the active adapters of each carrier.
    """
    for carrier in carriers:
        wanted = carrier.active_adapters if names is None else names
        if wanted:
            adapters = carrier.adapters
            for name in wanted:
                if name in adapters:
                    yield carrier, name


def active_after_deletion(adapter: str, active: Sequence[str], others: Iterable[str]) -> list[str]:
    """Return the active adapters after the deletion of `adapter`: those of `active` without it.

    If `adapter` was the only active one, returns the first of `others` by name, with a warning; an empty list if there
    is none.
    """
    left = [name for name in active if name != adapter]
    if not left and adapter in active and (left := sorted(others)[:1]):
        warn(f"Adapter {adapter} was active which is now deleted. Setting active adapter to {left[0]}.")
    return left


def check_not_merged(names: Sequence[str], merged: Collection[str]) -> None:
    """Raise ValueError, with all their names, if adapters that are to be deleted are in `merged`."""
    wrong = [name for name in names if name in merged]
    if wrong:
        raise ValueError(f"Cannot delete adapter(s) {wrong} while they are merged. Please unmerge them first.")


class Shell(nn.Module):
    """A module around a carrier, which gives the carrier one more name in memory.

    It has no tensors, and runs as `shown`.
    """

    inner_name: str  # that name
    inner_host: Carrier


def carrier_of(module: object) -> Carrier | None:
    """Return the carrier that a module is, or the `inner_host` of a `Shell`.

    Returns None for any other module or object. A module that is itself a carrier also gives None if its `replaces` is
    false; a Shell's carrier is returned without that check.
    """
    if isinstance(module, Carrier):
        return module if module.replaces else None
    return module.inner_host if isinstance(module, Shell) else None


def layer_in(module: nn.Module) -> Any:
    """Return the `adapter_layer` of the carrier that a module is or shows.

    Returns None if it is no carrier, or one without such a layer, such as the wrapper of a head.
    """
    carrier = carrier_of(module)
    return None if carrier is None else carrier.adapter_layer


# tensors that all layers of a model share: the tuner holds them once, in containers that each layer shows as well


class SharedTensors(Carrier):
    """The carrier of shared tensors: containers by name, each with one entry per adapter."""

    key = ""
    keyed = True  # names in memory contain that of the adapter

    def __init__(self) -> None:
        """Begin without containers, and without a call object until the tuner sets one."""
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
            adapter: its values replace those that it had under the same names.
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
        """Return the slots of an adapter's tensors in all containers, as a new list; [] for an unknown adapter.

        Parameters that were noted as never trainable do not train.
        """
        never = self.never.get(adapter, set())
        return [slot for name, c in self.containers.items() for slot in iter_slots(name, c, adapter, never)]

    def drop(self, adapter: str) -> None:
        """Delete an adapter from all containers, and forget the notes of its tensors that never train.

        Containers stay.

        Containers without the adapter are left alone; for an unknown adapter nothing happens.
        """
        for container in self.containers.values():
            if adapter in container:
                del container[adapter]
        self.never.pop(adapter, None)

    def separate_buffers(self, adapter: str) -> list[tuple[Slot, Tensor]]:
        """Clone each buffer of an adapter that is the same tensor as another one in the same container or module, so
        that a load may write to it.

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

        Slots with other values keep their new tensor.

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
        """Delete these containers, also from their parent modules, which stay.

        For the containers that a failed injection made. Raises KeyError for a name that is not here.
        """
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
