# SPDX-License-Identifier: Apache-2.0
"""Containers keyed by adapter name, and which of them a declared value belongs in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from graft.core.lean import ModuleDict, bare


class BufferDict(nn.Module):
    """Buffers by name: what `nn.ParameterDict` is for parameters."""

    def __init__(self, buffers: dict[str, Tensor] | None = None, persistent: bool = False):
        super().__init__()
        self.persistent = persistent
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

    def keys(self):
        return self._buffers.keys()

    def values(self):
        return self._buffers.values()

    def items(self):
        return self._buffers.items()

    def pop(self, name: str) -> Tensor:
        return self._buffers.pop(name)  # type: ignore[return-value]


class Transient:
    """A tensor or parameter that is not part of a checkpoint: recomputed or seeded again on load."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class TransientParameterDict(nn.ParameterDict):
    """Parameters that are not part of a checkpoint."""


FACTS = frozenset({float, int, bool, str, type(None)})  # types of what is kept in plain dicts


class Slot(NamedTuple):
    """Where one tensor of an adapter stands."""

    container: str
    path: str  # below the adapter's name
    owner: nn.Module
    attribute: str
    trains: bool  # a parameter, not a buffer
    saved: bool
    held: dict[str, Any]  # the modules of the container, by adapter; empty if the tensor itself stands in it
    root: nn.Module | None  # what `held` had for the adapter when this was written down; None: not to be relied on

    @property
    def tensor(self) -> Tensor:
        held = self.owner._parameters if self.trains else self.owner._buffers
        return held[self.attribute]  # type: ignore[return-value]


def slots_of(key: str, container: Any, adapter: str) -> Iterator[Slot]:
    """The slots that `container`, called `key`, has for an adapter."""
    top = module_of(container, adapter)
    saved = {(id(owner), name) for _, owner, name, _ in tensors_of(container, adapter)}
    for path, owner, name, _ in tensors_of(container, adapter, transient=True):
        trains = name in owner._parameters
        root = top if owner is top else None  # deeper, any module on the way may become another
        yield Slot(key, path, owner, name, trains, (id(owner), name) in saved, container._modules if path else {}, root)


Flag = tuple[
    dict[str, Any], nn.Module | None, dict[str, Any], str
]  # of a Slot: held, root, owner._parameters, attribute


def container_for(value: Any) -> Any:
    """An empty container of the kind that holds `value` for each adapter."""
    if isinstance(value, nn.Module):
        return bare(ModuleDict)
    if not isinstance(value, (Tensor, Transient)):
        return {}
    if isinstance(value, nn.Parameter):
        return nn.ParameterDict()
    if isinstance(value, Transient) and isinstance(value.tensor, nn.Parameter):
        return TransientParameterDict()
    if isinstance(value, Transient):
        return BufferDict(persistent=False)
    return BufferDict(persistent=True)


def module_of(container: Any, adapter: str) -> nn.Module | None:
    """The module that a container holds for `adapter`, if it holds modules."""
    if isinstance(container, (nn.ModuleDict, dict)) and adapter in container:
        value = container[adapter]
        return value if isinstance(value, nn.Module) else None
    return None


def tensors_of(container: Any, adapter: str, transient: bool = False) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """(path below the adapter's name, owner, attribute, tensor) of each tensor of `adapter`, persistent or all."""
    root = module_of(container, adapter)
    if root is not None:
        for prefix, module in root.named_modules(remove_duplicate=False) if root._modules else (("", root),):
            dot = f"{prefix}." if prefix else ""
            for name, p in module._parameters.items():
                if p is not None:
                    yield f"{dot}{name}", module, name, p
            for name, b in module._buffers.items():
                if b is not None and (transient or name not in module._non_persistent_buffers_set):
                    yield f"{dot}{name}", module, name, b
    elif isinstance(container, nn.ParameterDict):
        if adapter in container and (transient or not isinstance(container, TransientParameterDict)):
            yield "", container, adapter, container[adapter]
    elif isinstance(container, BufferDict) and (transient or container.persistent) and adapter in container:
        yield "", container, adapter, container[adapter]


def parameters_of(container: Any, adapter: str) -> Iterator[nn.Parameter]:
    """The parameters of `adapter` in a container."""
    root = module_of(container, adapter)
    if root is not None:
        yield from root.parameters() if root._modules else [p for p in root._parameters.values() if p is not None]
    elif isinstance(container, nn.ParameterDict) and adapter in container:
        yield container[adapter]
