# SPDX-License-Identifier: Apache-2.0
"""The life cycle of all that carries tensors of adapters: layers, wrappers, prompts, shared tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from graft.core.call import Call
from graft.core.containers import Slot
from graft.core.errors import warn
from graft.core.gate import all_adapters, changes
from graft.core.names import as_name_list


class State:
    """The state of a carrier that changes as adapters are switched. A plain object: setting an attribute of a module
    takes ten times as long."""

    def __init__(self, call: Call | None = None) -> None:
        self.call = call  # may disable adapters
        self.active: list[str] = []
        self.weights: tuple[float, ...] | None = None  # of the active ones, if they act as an average
        self.apart = False  # each active one acts on its own rows, which a call names
        self.disabled = False
        self.trainable: Sequence[str] = ()  # adapters that require gradients
        self.slots: dict[str, list[Slot]] = {}  # of layers: by adapter, as last seen
        self.merged: list[str] = []  # adapters that the base does the work of
        self.undo: list[tuple[str, Any, Tensor | None]] = []  # (kind, state of the weight, the bias) of each merge
        self.survived: list[Tensor] = []  # of each merge that rounded the weight: see `core/finite.py`

    def let_train(self, adapter: str, on: bool) -> bool:
        """Let an adapter's parameters train or not. Return False if one no longer stands where it was last seen."""
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
    """Base of all that can carry adapters. A subclass says which it has (`adapters`), where their tensors stand
    (`slots`), how it forgets one (`drop`), and what follows when other adapters run (`refresh_plan`)."""

    state: State
    key: str  # path in the model
    inner_name: str  # name of the child that leads to the base model's module
    claim: str  # how adapters hold the module, in messages: "it … adapter(s) ['a']"
    takes_rows = False  # single rows of the module train
    beside = False  # it came along with an adapter that acts elsewhere
    adapter_layer: Any = None  # the layer that does its work
    replaces = True  # it takes the place of a module of the base model
    base_module: nn.Module  # that module
    remainder: nn.Module  # what unloading leaves in its place

    @property
    def merged_adapters(self) -> list[str]:
        return []

    @property
    def adapters(self) -> list[str]:
        raise NotImplementedError

    def slots(self, adapter: str) -> Sequence[Slot]:
        """Return the slots in which an adapter's tensors stand now."""
        raise NotImplementedError

    def drop(self, adapter: str) -> None:
        """Let go of an adapter's tensors."""
        raise NotImplementedError

    def check_active(self, names: Sequence[str]) -> None:
        """Raise if these adapters cannot be active together here."""

    def refresh_plan(self) -> None:
        """Decide anew what runs."""

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters: of a layer, also those that it does not carry; of a wrapper, those that it has."""
        return self.state.active

    @property
    def active_adapter(self) -> str | list[str]:
        active = self.active_adapters
        return active[0] if len(active) == 1 else active

    # PEFT's names for `adapters`, which other packages ask for

    @property
    def _adapters(self) -> set[str]:
        return set(self.adapters)

    def _get_available_adapters(self) -> set[str]:
        return set(self.adapters)

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self.adapters)

    @property
    def disable_adapters(self) -> bool:
        """Return True if adapters are switched off, or disabled for the call that this thread is in."""
        state = self.state
        return state.disabled or (state.call is not None and state.call.off)

    def parameters_of(self, adapter: str) -> Iterator[nn.Parameter]:
        for slot in self.slots(adapter):
            if slot.is_parameter:
                yield slot.tensor  # type: ignore[misc]

    def require_grad(self, adapter: str, requires_grad: bool) -> None:
        """Let the parameters of one adapter train or not, but for those that never do."""
        for slot in self.slots(adapter):
            if slot.trains and not slot.is_in_flat_parameter:
                slot.tensor.requires_grad = requires_grad

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        adapters = self.adapters
        for name in as_name_list(adapter_names, "set_requires_grad"):
            if name in adapters:
                self.require_grad(name, requires_grad)
                trainable = [n for n in self.state.trainable if n != name]
                self.state.trainable = [*trainable, name] if requires_grad else trainable

    @changes(all_adapters)
    def set_adapter(self, adapters: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make `adapters` the active ones (in this order) and, unless for inference, the trainable ones."""
        names = as_name_list(adapters, "set_adapter")
        if len(names) > 1:
            self.check_active(names)
        self.activate(names, not inference_mode)

    def activate(
        self, names: list[str], train: bool, weights: tuple[float, ...] | None = None, apart: bool = False
    ) -> None:
        """Do as `set_adapter`, without its check. weights, apart: see `State`."""
        state, on = self.state, names if train else ()
        for name in state.trainable:
            if name not in on and not state.let_train(name, False):
                self.require_grad(name, False)
        for name in on:
            if not state.let_train(name, True):
                self.require_grad(name, True)
        state.active, state.trainable, state.weights, state.apart = names, on, weights, apart
        self.refresh_plan()

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off."""
        self.state.disabled = not enabled
        self.refresh_plan()

    def forget(self, adapter: str) -> None:
        """Forget `adapter` and its tensors."""
        self.drop(adapter)
        state = self.state
        if adapter in state.trainable:
            state.trainable = [a for a in state.trainable if a != adapter]
        if adapter in state.active:
            state.active, state.weights = [a for a in state.active if a != adapter], None
            self.refresh_plan()

    @changes(all_adapters)
    def delete_adapter(self, adapter: str, new_active_adapters: list[str] | None = None) -> None:
        """Forget `adapter`. If it was active, activate `new_active_adapters`; None: as `active_after_deletion` says."""
        before = self.active_adapters
        self.forget(adapter)
        if adapter in before:
            self.set_adapter(
                active_after_deletion(adapter, before, self.adapters)
                if new_active_adapters is None
                else new_active_adapters
            )


C = TypeVar("C", bound=Carrier)


def iter_carried(carriers: Iterable[C], names: Sequence[str] | None = None) -> Iterator[tuple[C, str]]:
    """Yield each carrier with each of these adapters that it has; None: of those that are active there."""
    for carrier in carriers:
        wanted = carrier.active_adapters if names is None else names
        if wanted:
            adapters = carrier.adapters
            for name in wanted:
                if name in adapters:
                    yield carrier, name


def active_after_deletion(adapter: str, active: Sequence[str], others: Iterable[str]) -> list[str]:
    """Return what is active once `adapter` is deleted: the others that were; if there are none, the first (by name) of
    `others`, with a warning."""
    left = [name for name in active if name != adapter]
    if not left and adapter in active and (left := sorted(others)[:1]):
        warn(f"Adapter {adapter} was active which is now deleted. Setting active adapter to {left[0]}.")
    return left


def check_not_merged(names: Sequence[str], merged: Collection[str]) -> None:
    """Raise ValueError if one of these adapters, to be deleted, is merged."""
    wrong = [name for name in names if name in merged]
    if wrong:
        raise ValueError(f"Cannot delete adapter(s) {wrong} while they are merged. Please unmerge them first.")


class Shell(nn.Module):
    """A module around a carrier for one more name in memory. It carries nothing, and runs as what it shows."""

    inner_name: str  # that name
    inner_host: Carrier


def carrier_of(module: object) -> Carrier | None:
    """Return the carrier in the place of another module that this is, or shows; None for any other."""
    if isinstance(module, Carrier):
        return module if module.replaces else None
    return module.inner_host if isinstance(module, Shell) else None


def layer_in(module: nn.Module) -> Any:
    """Return the adapter layer that a module is or shows; None if it is no carrier, or trains whole."""
    carrier = carrier_of(module)
    return None if carrier is None else carrier.adapter_layer
