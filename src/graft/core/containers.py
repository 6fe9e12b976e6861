# SPDX-License-Identifier: Apache-2.0
"""Containers keyed by adapter name, slots in them, and device and dtype of what they hold."""

from __future__ import annotations

from collections.abc import Collection, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from graft.core.lean import ModuleDict, new_lean
from graft.core.wrappers import collect_parameters, walk_unwrapped


class BufferDict(nn.Module):
    """Buffers by name, as `nn.ParameterDict` has parameters.

    persistent: in the state dict, and in checkpoints; each buffer that `store_value` puts here may differ.
    """

    def __init__(self, buffers: dict[str, Tensor] | None = None, persistent: bool = False):
        super().__init__()
        self.persistent = persistent
        self._in_checkpoint: dict[str, bool] = {}  # whether checkpoints hold a buffer
        for name, value in (buffers or {}).items():
            self[name] = value

    def is_in_checkpoint(self, name: str) -> bool:
        """Return True if a checkpoint holds the buffer of this name."""
        return self._in_checkpoint.get(name, self.persistent)

    def _store_value(self, name: str, value: Tensor | Transient) -> None:
        transient = isinstance(value, Transient)
        self._in_checkpoint[name] = not transient or isinstance(value, CheckpointOnly)
        self.register_buffer(name, value.tensor if isinstance(value, Transient) else value, persistent=not transient)

    def __getitem__(self, name: str) -> Tensor:
        return self._buffers[name]  # type: ignore[return-value]

    def __setitem__(self, name: str, value: Tensor) -> None:
        if name in self._buffers:
            self._buffers[name] = value
        else:
            self.register_buffer(name, value, persistent=self.persistent)

    def __delitem__(self, name: str) -> None:
        del self._buffers[name]
        self._in_checkpoint.pop(name, None)
        self._non_persistent_buffers_set.discard(name)

    def __contains__(self, name: object) -> bool:
        return name in self._buffers

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def keys(self) -> KeysView[str]:
        return self._buffers.keys()

    def values(self) -> ValuesView[Tensor | None]:
        return self._buffers.values()

    def items(self) -> ItemsView[str, Tensor | None]:
        return self._buffers.items()

    def update(self, buffers: Mapping[str, Tensor] | BufferDict | Iterable[tuple[str, Tensor]]) -> None:
        pairs = buffers.items() if isinstance(buffers, (Mapping, BufferDict)) else buffers
        for name, value in pairs:
            self[name] = value  # type: ignore[assignment]

    def pop(self, name: str) -> Tensor:
        value = self[name]
        del self[name]
        return value


class AnyDict(nn.Module):
    """Modules, parameters and buffers by name: for methods that call different things by one name on one layer."""

    def __init__(self, other: nn.ModuleDict | nn.ParameterDict | BufferDict) -> None:
        super().__init__()
        self.transient: set[str] = set()  # names of values that are not part of a checkpoint
        for name in list(other):
            self[name] = other[name]
            if isinstance(other, TransientParameterDict) or (
                isinstance(other, BufferDict) and not other.is_in_checkpoint(name)
            ):
                self.transient.add(name)
            if name in other._non_persistent_buffers_set:
                self._non_persistent_buffers_set.add(name)

    def _dict_with(self, name: object) -> dict[str, Any] | None:
        return next((d for d in (self._modules, self._parameters, self._buffers) if name in d), None)

    def __getitem__(self, name: str) -> nn.Module | Tensor:
        home = self._dict_with(name)
        if home is None:
            raise KeyError(name)
        return home[name]  # type: ignore[no-any-return]

    def __setitem__(self, name: str, value: nn.Module | Tensor | Transient) -> None:
        kind, value = value, value.tensor if isinstance(value, Transient) else value
        home = self._dict_with(name)
        if home is not None:
            del home[name]
        if isinstance(kind, Transient):
            if not isinstance(kind, CheckpointOnly):
                self.transient.add(name)
            if not isinstance(value, nn.Parameter):
                self._non_persistent_buffers_set.add(name)
        if isinstance(value, nn.Module):
            self._modules[name] = value
        elif isinstance(value, nn.Parameter):
            self._parameters[name] = value
        else:
            self._buffers[name] = value

    def __delitem__(self, name: str) -> None:
        home = self._dict_with(name)
        if home is None:
            raise KeyError(name)
        del home[name]
        self.transient.discard(name)
        self._non_persistent_buffers_set.discard(name)

    def __contains__(self, name: object) -> bool:
        return self._dict_with(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter([*self._modules, *self._parameters, *self._buffers])

    def __len__(self) -> int:
        return len(self._modules) + len(self._parameters) + len(self._buffers)

    def keys(self) -> list[str]:
        return list(self)

    def pop(self, name: str) -> nn.Module | Tensor:
        value = self[name]
        del self[name]
        return value


class Transient:
    """A tensor or parameter that is not part of a checkpoint: a load computes or draws it again."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class CheckpointOnly(Transient):
    """A tensor that a checkpoint holds, and the state dict does not: PEFT keeps it outside of the module's tensors."""


class TransientParameterDict(nn.ParameterDict):
    """Parameters that are not part of a checkpoint."""


class Attached(NamedTuple):
    """A container of tensors that all layers of the model share."""

    container: object


FACTS = frozenset({float, int, bool, str, type(None)})  # types of facts, which stand in plain dicts


class ReadOnlyFacts(dict[str, object]):
    """Facts by adapter which tell how it was made, and which nothing computes with: setting one is refused."""

    key: ClassVar[str]  # their name on the layer

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise AttributeError(
            f"layer.{self.key}[…] cannot be set: it tells how an adapter was made, and nothing computes with it. Set "
            "what the layer computes with, such as layer.scaling[…], or add an adapter with another config."
        )

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[object, ...]:
        return read_only_facts, (self.key, dict(self))


@cache
def make_facts_class(key: str) -> type[ReadOnlyFacts]:
    """Return the class of the facts that a layer shows by this name."""
    return type("ReadOnlyFacts", (ReadOnlyFacts,), {"key": key, "__slots__": ()})


def read_only_facts(key: str, values: dict[str, object]) -> ReadOnlyFacts:
    return make_facts_class(key)(values)


@dataclass(slots=True, eq=False)  # made and read in less time than a tuple with names
class Slot:
    """The place of one tensor of an adapter."""

    container: str
    path: str  # below the adapter's name
    owner: nn.Module
    attribute: str
    where: dict[str, Any]  # the owner's parameters or buffers
    is_parameter: bool
    trains: bool  # False: frozen for ever
    saved: bool
    by_adapter: dict[str, Any]  # the modules of the container, by adapter; None if the tensor itself stands in it
    root: nn.Module | None  # the module in `by_adapter` when this slot was made; None: look the slot up again

    @property
    def tensor(self) -> Tensor:
        tensor: Tensor = self.where[self.attribute]
        return tensor

    @property
    def is_in_flat_parameter(self) -> bool:
        """Return True if FSDP keeps the tensor in a flat parameter, which trains as a whole."""
        return self.is_parameter and self.where is self.owner.__dict__

    def assign(self, value: Tensor, device: torch.device | None = None) -> None:
        """Put `value` in place: copy it into an existing tensor (an optimizer may hold it), or replace one on meta."""
        tensor = self.tensor
        if not tensor.is_meta:
            with torch.no_grad():
                tensor.copy_(value)
            return
        if value.device != device or value.dtype != tensor.dtype:
            value = value.to(device=device, dtype=tensor.dtype)
        self.where[self.attribute] = nn.Parameter(value, tensor.requires_grad) if self.is_parameter else value


def slots_of(
    key: str, container: nn.Module, adapter: str, never: Collection[tuple[str, str]] | None = None
) -> Iterator[Slot]:
    """Yield the slots that `container`, called `key`, has for an adapter.

    never: (container, path) of parameters that never train; None: those that do not require gradients now.
    """
    top = adapter_module(container, adapter)
    saved = {(id(owner), name) for _, owner, name, _ in iter_tensors(container, adapter)}
    for path, owner, name, tensor in iter_tensors(container, adapter, transient=True):
        is_buffer = name in owner._buffers
        is_parameter, where = not is_buffer, owner._buffers if is_buffer else parameter_dict(owner, name)
        trains = is_parameter and (tensor.requires_grad if never is None else (key, path) not in never)
        root = top if owner is top else None  # deeper, any module on the way may become another
        modules = container._modules if path else {adapter: None}
        yield Slot(key, path, owner, name, where, is_parameter, trains, (id(owner), name) in saved, modules, root)


def parameter_dict(owner: nn.Module, name: str) -> dict[str, Any]:
    """Return the dictionary in which a module has a parameter: that of its attributes, if FSDP put it there."""
    return owner._parameters if name in owner._parameters else owner.__dict__


def container_class(value: object) -> type:
    """Return the class of the container that holds `value` for each adapter."""
    tensor = value.tensor if isinstance(value, Transient) else value
    if isinstance(tensor, nn.Module):
        return ModuleDict
    if not isinstance(tensor, Tensor):
        return dict
    if not isinstance(tensor, nn.Parameter):
        return BufferDict
    return TransientParameterDict if isinstance(value, Transient) else nn.ParameterDict


def container_for(value: object) -> Any:
    """Make an empty container for values like this one."""
    kind = container_class(value)
    if kind is BufferDict:
        return BufferDict(persistent=not isinstance(value, Transient))
    return new_lean(ModuleDict) if kind is ModuleDict else kind()


def can_hold(container: object, value: object) -> bool:
    """Return True if a container holds values of this kind."""
    kind = container_class(value)
    return isinstance(container, dict) if kind is dict else type(container) in (kind, AnyDict)


def store_value(container: Any, adapter: str, value: Any) -> None:
    """Put a value into a container that can hold it."""
    if isinstance(container, BufferDict):
        container._store_value(adapter, value)
    elif isinstance(value, Transient) and not isinstance(container, AnyDict):
        container[adapter] = value.tensor
    else:
        container[adapter] = value


def adapter_module(container: object, adapter: str) -> nn.Module | None:
    """Return the module that a container holds for `adapter`; None if it holds none."""
    if isinstance(container, (nn.ModuleDict, AnyDict, dict)) and adapter in container:
        value = container[adapter]
        return value if isinstance(value, nn.Module) else None
    return None


def iter_tensors(
    container: object, adapter: str, transient: bool = False
) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Yield (path below its name, owner, attribute, tensor) of each tensor of `adapter`, persistent or all."""
    root = adapter_module(container, adapter)
    if root is not None:
        for prefix, module in walk_unwrapped(root) if root._modules else (("", root),):
            dot = f"{prefix}." if prefix else ""
            for name, p in collect_parameters(module).items():
                yield f"{dot}{name}", module, name, p
            for name, b in module._buffers.items():
                if b is not None and (transient or name not in module._non_persistent_buffers_set):
                    yield f"{dot}{name}", module, name, b
    elif isinstance(container, nn.ParameterDict):
        if adapter in container and (transient or not isinstance(container, TransientParameterDict)):
            yield "", container, adapter, container[adapter]
    elif isinstance(container, AnyDict):
        if adapter in container and (transient or adapter not in container.transient):
            yield "", container, adapter, container[adapter]  # type: ignore[misc]
    elif (
        isinstance(container, BufferDict)
        and adapter in container
        and (transient or container.is_in_checkpoint(adapter))
    ):
        yield "", container, adapter, container[adapter]


UPCAST = (  # adapters in these train in float32 unless the user says otherwise
    torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz,
    getattr(torch, "float8_e8m0fnu", torch.float16),  # from torch 2.7 on
)  # fmt: skip


def move_tensor(t: Tensor, device: torch.device | None, dtype: torch.dtype | None, upcast: bool) -> Tensor:
    """Return `t` on `device`; floats rounded to `dtype`, as PEFT rounds them, and then widened if `upcast`."""
    if t.is_floating_point() or t.is_complex():
        if t.is_floating_point() and dtype is not None:
            t = t.to(dtype)
        if upcast and t.dtype in UPCAST:
            t = t.to(torch.float32)
    return t if device is None or t.device == device or t.is_meta else t.to(device)


class Exact(nn.Module):
    """A module whose buffers move with the base weight and keep their dtype."""


def place_tensor(
    owner: nn.Module, name: str, device: torch.device | None, dtype: torch.dtype | None, upcast: bool
) -> None:
    """Move and cast a parameter or buffer of a module; leave a parameter alone that FSDP keeps in a flat one."""
    if (p := owner._parameters.get(name)) is not None:
        before = p.data
        data = move_tensor(before, device, dtype, upcast)
        if data is not before:
            owner._parameters[name] = nn.Parameter(data, requires_grad=p.requires_grad)
    elif (b := owner._buffers.get(name)) is not None:
        upcast = upcast and isinstance(owner, (BufferDict, AnyDict))  # as in PEFT: not those of an adapter's modules
        owner._buffers[name] = move_tensor(b, device, None if isinstance(owner, Exact) else dtype, upcast)


def place_tensors(
    container: object, adapter: str, device: torch.device | None, dtype: torch.dtype | None, upcast: bool
) -> None:
    """Move and cast the tensors of `adapter` in `container`. Integer tensors keep their dtype."""
    for _, owner, name, _ in iter_tensors(container, adapter, transient=True):
        place_tensor(owner, name, device, dtype, upcast)
