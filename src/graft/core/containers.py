# SPDX-License-Identifier: Apache-2.0
"""Containers keyed by adapter name, the choice of one for a declared value, and the slots in them."""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graft.core.lean import ModuleDict, bare
from graft.core.wrappers import parameters_in, walk


class BufferDict(nn.Module):
    """Buffers by name, as `nn.ParameterDict` has parameters. persistent: in the state dict; filed: in checkpoints."""

    def __init__(self, buffers: dict[str, Tensor] | None = None, persistent: bool = False, filed: bool | None = None):
        super().__init__()
        self.persistent = persistent
        self.filed = persistent if filed is None else filed
        for name, value in (buffers or {}).items():
            self[name] = value

    def __getitem__(self, name: str) -> Tensor:
        return self._buffers[name]  # type: ignore[return-value]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value, persistent=self.persistent)

    def __delitem__(self, name: str) -> None:
        del self._buffers[name]

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
        return self._buffers.pop(name)  # type: ignore[return-value]


class AnyDict(nn.Module):
    """Modules, parameters and buffers by name: for methods that call different things by one name on one layer."""

    def __init__(self, other: Any) -> None:
        super().__init__()
        self.transient: set[str] = set()  # names of values that are not part of a checkpoint
        for name in list(other):
            self[name] = other[name]
            if isinstance(other, TransientParameterDict) or (isinstance(other, BufferDict) and not other.filed):
                self.transient.add(name)

    def _held(self, name: object) -> dict[str, Any] | None:
        return next((d for d in (self._modules, self._parameters, self._buffers) if name in d), None)

    def __getitem__(self, name: str) -> Any:
        held = self._held(name)
        if held is None:
            raise KeyError(name)
        return held[name]

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(value, Transient):
            if not isinstance(value, Filed):
                self.transient.add(name)
            value = value.tensor
        held = self._held(name)
        if held is not None:
            del held[name]
        if isinstance(value, nn.Module):
            self._modules[name] = value
        elif isinstance(value, nn.Parameter):
            self._parameters[name] = value
        else:
            self._buffers[name] = value

    def __delitem__(self, name: str) -> None:
        held = self._held(name)
        if held is None:
            raise KeyError(name)
        del held[name]
        self.transient.discard(name)

    def __contains__(self, name: object) -> bool:
        return self._held(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter([*self._modules, *self._parameters, *self._buffers])

    def __len__(self) -> int:
        return len(self._modules) + len(self._parameters) + len(self._buffers)

    def keys(self) -> list[str]:
        return list(self)

    def pop(self, name: str) -> Any:
        value = self[name]
        del self[name]
        return value


class Transient:
    """A tensor or parameter that is not part of a checkpoint: a load computes or draws it again."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class Filed(Transient):
    """A tensor that a checkpoint holds, and the state dict does not: PEFT keeps it outside of the module's tensors."""


class TransientParameterDict(nn.ParameterDict):
    """Parameters that are not part of a checkpoint."""


class Attached(NamedTuple):
    """A container of tensors that all layers of the model share."""

    container: Any


FACTS = frozenset({float, int, bool, str, type(None)})  # types of facts, which stand in plain dicts


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
    held: dict[str, Any]  # the modules of the container, by adapter; None if the tensor itself stands in it
    root: nn.Module | None  # the module in `held` when this slot was made; None: look the slot up again

    @property
    def tensor(self) -> Tensor:
        tensor: Tensor = self.where[self.attribute]
        return tensor

    @property
    def flattened(self) -> bool:
        """Say whether FSDP keeps the tensor in a flat parameter, which trains as a whole."""
        return self.is_parameter and self.where is self.owner.__dict__

    def assign(self, value: Tensor, device: Any = None) -> None:
        """Put `value` in place: copy it into an existing tensor (an optimizer may hold it), or replace one on meta."""
        here = self.tensor
        if not here.is_meta:
            with torch.no_grad():
                here.copy_(value)
            return
        if value.device != device or value.dtype != here.dtype:
            value = value.to(device=device, dtype=here.dtype)
        self.where[self.attribute] = nn.Parameter(value, here.requires_grad) if self.is_parameter else value


def slots_of(key: str, container: Any, adapter: str, never: Any = None) -> Iterator[Slot]:
    """Yield the slots that `container`, called `key`, has for an adapter.

    never: (container, path) of parameters that never train; None: those that do not require gradients now.
    """
    top = module_of(container, adapter)
    saved = {(id(owner), name) for _, owner, name, _ in tensors_of(container, adapter)}
    for path, owner, name, tensor in tensors_of(container, adapter, transient=True):
        is_buffer = name in owner._buffers
        is_parameter, where = not is_buffer, owner._buffers if is_buffer else held_in(owner, name)
        trains = is_parameter and (tensor.requires_grad if never is None else (key, path) not in never)
        root = top if owner is top else None  # deeper, any module on the way may become another
        held = container._modules if path else {adapter: None}
        yield Slot(key, path, owner, name, where, is_parameter, trains, (id(owner), name) in saved, held, root)


def held_in(owner: nn.Module, name: str) -> dict[str, Any]:
    """Return the dictionary in which a module has a parameter: that of its attributes, if FSDP put it there."""
    return owner._parameters if name in owner._parameters else owner.__dict__


def container_for(value: Any) -> Any:
    """Make an empty container of the kind that holds `value` for each adapter."""
    if isinstance(value, nn.Module):
        return bare(ModuleDict)
    if not isinstance(value, (Tensor, Transient)):
        return {}
    if isinstance(value, nn.Parameter):
        return nn.ParameterDict()
    if isinstance(value, Transient) and isinstance(value.tensor, nn.Parameter):
        return TransientParameterDict()
    if isinstance(value, Transient):
        return BufferDict(persistent=False, filed=isinstance(value, Filed))
    return BufferDict(persistent=True)


def takes(container: Any, value: Any) -> bool:
    """Say whether a container holds values of this kind."""
    return type(container) is AnyDict or type(container) is type(container_for(value))


def module_of(container: Any, adapter: str) -> nn.Module | None:
    """Return the module that a container holds for `adapter`; None if it holds none."""
    if isinstance(container, (nn.ModuleDict, AnyDict, dict)) and adapter in container:
        value = container[adapter]
        return value if isinstance(value, nn.Module) else None
    return None


def tensors_of(container: Any, adapter: str, transient: bool = False) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Yield (path below its name, owner, attribute, tensor) of each tensor of `adapter`, persistent or all."""
    root = module_of(container, adapter)
    if root is not None:
        for prefix, module in walk(root) if root._modules else (("", root),):
            dot = f"{prefix}." if prefix else ""
            for name, p in parameters_in(module).items():
                yield f"{dot}{name}", module, name, p
            for name, b in module._buffers.items():
                if b is not None and (transient or name not in module._non_persistent_buffers_set):
                    yield f"{dot}{name}", module, name, b
    elif isinstance(container, nn.ParameterDict):
        if adapter in container and (transient or not isinstance(container, TransientParameterDict)):
            yield "", container, adapter, container[adapter]
    elif isinstance(container, AnyDict):
        if adapter in container and (transient or adapter not in container.transient):
            yield "", container, adapter, container[adapter]
    elif isinstance(container, BufferDict) and (transient or container.filed) and adapter in container:
        yield "", container, adapter, container[adapter]
