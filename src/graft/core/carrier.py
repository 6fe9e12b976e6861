# SPDX-License-Identifier: Apache-2.0
"""Activation, training and deletion of adapters, common to all objects that hold adapter tensors: layers, wrappers of
heads, prompts, shared tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from graft.core.call import Call
from graft.core.containers import Slot
from graft.core.errors import warn
from graft.core.gate import all_adapters, changes
from graft.core.names import as_name_list


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
        self.undo: list[tuple[str, Any, Tensor | None]] = []  # (kind, state of the weight, the bias) of each merge
        self.survived: list[Tensor] = []  # of each merge that rounded the weight: see `core/finite.py`

    def set_trainable(self, adapter: str, on: bool) -> bool:
        """Set `requires_grad` of an adapter's parameters to `on`, except for those that never train.

        Returns False, possibly after some were set, if a module in `slots` was replaced or the adapter has no slots:
        the caller then looks the slots up again.
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
        """Return the names of merged adapters: none here. Layers override it."""
        return []

    @property
    def adapters(self) -> list[str]:
        """Return the names of the adapters. Each subclass defines it."""
        raise NotImplementedError

    def slots(self, adapter: str) -> Sequence[Slot]:
        """Return the present slots of an adapter's tensors. Each subclass defines it."""
        raise NotImplementedError

    def drop(self, adapter: str) -> None:
        """Remove the tensors of an adapter, and leave the lists of active and trainable adapters alone.

        Each subclass defines it.
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
        """The set of adapter names, under PEFT's name."""
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
        """Yield the parameters of an adapter, without its buffers."""
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

        Ignores names of adapters that this carrier lacks, and parameters that never train.
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

        Adapters that trained and are not among `names` are frozen, as is every one if `train` is False.

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
        """Switch all adapters on or off in the state, and call `refresh_plan`."""
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

        If that is None, the remaining active adapters stay active; if none remains, the first other adapter by name
        becomes active, with a warning. Runs as a change of the model: waits until its calls have ended. Nothing is
        checked: an active adapter that this carrier does not hold is forgotten and replaced in the same way.
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
    """Raise ValueError, with the names, if adapters that are to be deleted are merged."""
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
    """Return the carrier that a module is, or that it shows as a `Shell`.

    Returns None for any other module, and for a carrier that replaces no module of the base model.
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
