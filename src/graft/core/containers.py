# SPDX-License-Identifier: Apache-2.0
"""Containers of tensors keyed by adapter name, the slots of tensors in them, and moves of tensors to a device and
dtype.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, MutableMapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from graft.core.lean import ModuleDict, new_lean
from graft.core.wrappers import collect_parameters, walk_unwrapped


class BufferDict(nn.Module, MutableMapping[str, Tensor]):
    """Buffers by name, as `nn.ParameterDict` has parameters.

    Two containers are equal only if they are one object. `update`, `pop`, `keys`, `values`, `items` and the other
    methods of a dict are those of `MutableMapping`.

    persistent: the state dict and checkpoints contain new buffers. `_store_value` sets this for each buffer separately.
    """

    __eq__, __hash__ = nn.Module.__eq__, nn.Module.__hash__  # not by entries, as mappings have it

    def __init__(self, buffers: dict[str, Tensor] | None = None, persistent: bool = False):
        """Register the buffers of `buffers`, persistent or not as the container is."""
        super().__init__()
        self.persistent = persistent
        self._in_checkpoint: dict[str, bool] = {}  # whether checkpoints contain a buffer
        self.update(buffers or {})

    def is_in_checkpoint(self, name: str) -> bool:
        """Return True if a checkpoint holds the buffer: as `_store_value` noted for it, else `persistent`."""
        return self._in_checkpoint.get(name, self.persistent)

    def _store_value(self, name: str, value: Tensor | Transient) -> None:
        """Register a buffer, or overwrite it.

        A plain tensor is part of the state dict and of checkpoints. The tensor of a `CheckpointOnly` is part of
        checkpoints alone, that of any other `Transient` of neither.
        """
        transient = isinstance(value, Transient)
        self._in_checkpoint[name] = not transient or isinstance(value, CheckpointOnly)
        self.register_buffer(name, value.tensor if isinstance(value, Transient) else value, persistent=not transient)

    def __getitem__(self, name: str) -> Tensor:
        """Return a buffer. Raises KeyError if there is none of this name."""
        return self._buffers[name]  # type: ignore[return-value]

    def __setitem__(self, name: str, value: Tensor) -> None:
        """Replace a buffer, or register a new one, persistent if the container is."""
        if name in self._buffers:
            self._buffers[name] = value
        else:
            self.register_buffer(name, value, persistent=self.persistent)

    def __delitem__(self, name: str) -> None:
        """Remove a buffer, and the notes of whether checkpoints and the state dict contain it."""
        del self._buffers[name]
        self._in_checkpoint.pop(name, None)
        self._non_persistent_buffers_set.discard(name)

    def __contains__(self, name: object) -> bool:
        return name in self._buffers

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)


class AnyDict(nn.Module, MutableMapping[str, Any]):
    """Modules, parameters and buffers by name.

    It replaces another container if methods use its name for different kinds of values. Two containers are equal only
    if they are one object. `keys`, `pop` and the other methods of a dict are those of `MutableMapping`.
    """

    __eq__, __hash__ = nn.Module.__eq__, nn.Module.__hash__  # not by entries, as mappings have it

    def __init__(self, other: nn.ModuleDict | nn.ParameterDict | BufferDict) -> None:
        """Copy the entries of a container, without copying tensors.

        Names of entries that the checkpoint of `other` lacks go into `transient`. Buffers outside the state dict stay
        outside.
        """
        super().__init__()
        self.transient: set[str] = set()  # names of values that are not part of a checkpoint
        for name in list(other):
            self[name] = other[name]
            if not is_in_checkpoint(other, name):
                self.transient.add(name)
            if name in other._non_persistent_buffers_set:
                self._non_persistent_buffers_set.add(name)

    def _dict_with(self, name: object) -> dict[str, Any]:
        """Return the dict of modules, parameters or buffers that contains a name, searched in this order; a new, empty
        one if none does.
        """
        return next((d for d in (self._modules, self._parameters, self._buffers) if name in d), {})

    def __getitem__(self, name: str) -> nn.Module | Tensor:
        """Return the module, parameter or buffer of a name. Raises KeyError if there is none."""
        return self._dict_with(name)[name]  # type: ignore[no-any-return]

    def __setitem__(self, name: str, value: nn.Module | Tensor | Transient) -> None:
        """Set a value, which replaces one of any kind, together with its notes.

        The tensor of a `Transient` is stored: outside checkpoints, unless it is a `CheckpointOnly`, and outside the
        state dict, unless it is a parameter. Any other value is part of both.
        """
        kind, value = value, value.tensor if isinstance(value, Transient) else value
        if name in self:
            del self[name]
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
        """Remove a value and the notes of whether checkpoints contain it.

        Raises KeyError if there is none of this name.
        """
        del self._dict_with(name)[name]
        self.transient.discard(name)
        self._non_persistent_buffers_set.discard(name)

    def __contains__(self, name: object) -> bool:
        return name in self._dict_with(name)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names: first of modules, then of parameters, then of buffers."""
        return iter([*self._modules, *self._parameters, *self._buffers])

    def __len__(self) -> int:
        return len(self._modules) + len(self._parameters) + len(self._buffers)


class Transient:
    """A tensor or parameter that is not part of a checkpoint: a load computes or draws it again."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class CheckpointOnly(Transient):
    """A tensor that a checkpoint contains and the state dict does not: PEFT keeps it outside the module's tensors."""


class TransientParameterDict(nn.ParameterDict):
    """Parameters that are not part of a checkpoint."""


class Attached(NamedTuple):
    """A container of tensors that all layers of the model share, as a value of `Method.build`."""

    container: object


FACTS = frozenset({float, int, bool, str, type(None)})  # types of facts, which plain dicts contain


class ReadOnlyFacts(dict[str, object]):
    """Facts by adapter that say how it was made.

    No computation reads them, so that setting one raises AttributeError.
    """

    key: ClassVar[str]  # their name on the layer

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        """Raise AttributeError: the facts cannot be set, and the text names the attribute and the remedy.

        All setters are this.
        """
        raise AttributeError(
            f"layer.{self.key}[…] cannot be set: it says how an adapter was made, and no computation reads it. Set a "
            "value that the layer computes with, such as layer.scaling[…], or add an adapter with another config."
        )

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[object, ...]:
        """Return a pickle that calls `read_only_facts`."""
        return read_only_facts, (self.key, dict(self))


@cache
def make_facts_class(key: str) -> type[ReadOnlyFacts]:
    """Return the subclass of `ReadOnlyFacts` that has `key`, the name of a layer's attribute. The class is cached."""
    return type("ReadOnlyFacts", (ReadOnlyFacts,), {"key": key, "__slots__": ()})


def read_only_facts(key: str, values: dict[str, object]) -> ReadOnlyFacts:
    """Return the facts of the layer's attribute `key`, by adapter, as a dict that refuses changes."""
    return make_facts_class(key)(values)


@dataclass(slots=True, eq=False)  # faster to make and read than a NamedTuple
class Slot:
    """The place of one tensor of an adapter: the module that owns it, and the dict and name under which the module has
    it.
    """

    container: str
    path: str  # below the adapter's name; "": the container has the tensor itself
    owner: nn.Module
    attribute: str
    where: dict[str, Any]  # the owner's parameters or buffers, by name
    is_parameter: bool
    trains: bool  # False: never
    saved: bool
    by_adapter: dict[str, Any]  # modules of the container; {adapter: None} if it has the tensor itself
    root: nn.Module | None  # `by_adapter[adapter]` when this slot was made; else look it up again

    @property
    def tensor(self) -> Tensor:
        """The present tensor. Raises KeyError if the owner no longer has it."""
        tensor: Tensor = self.where[self.attribute]
        return tensor

    @property
    def is_in_flat_parameter(self) -> bool:
        """True if FSDP1 keeps the parameter as a view of a flat parameter, which trains as a whole.

        The parameter is then a plain attribute of its owner.
        """
        return self.is_parameter and self.where is self.owner.__dict__

    def assign(self, value: Tensor, device: torch.device | None = None) -> None:
        """Set the tensor's values.

        An existing tensor is overwritten in place, without gradients, as an optimizer may hold it.

        A tensor on the meta device is instead replaced in the layer by `value`, moved to `device` and cast to the
        tensor's dtype: as a parameter with the same `requires_grad`, or as a buffer. A value that fits already is not
        copied.
        """
        tensor = self.tensor
        if not tensor.is_meta:
            with torch.no_grad():
                tensor.copy_(value)
            return
        if value.device != device or value.dtype != tensor.dtype:
            value = value.to(device=device, dtype=tensor.dtype)
        self.where[self.attribute] = nn.Parameter(value, tensor.requires_grad) if self.is_parameter else value


def iter_slots(
    key: str, container: nn.Module, adapter: str, never: Collection[tuple[str, str]] | None = None
) -> Iterator[Slot]:
    """Yield the slots of an adapter's tensors in `container`, the layer's attribute `key`, in the order of
    `iter_tensors`.

    Includes tensors outside checkpoints, with `saved` False. Buffers never train. A tensor in a module below the
    adapter's has None as `root`, so that it is looked up again. Yields nothing if the container lacks the adapter.

    Args:
        never: (container, path) of parameters that never train; None: the parameters that do not require gradients now.
    """
    top = adapter_module(container, adapter)
    saved = {(id(owner), name) for _, owner, name, _ in iter_tensors(container, adapter)}
    for path, owner, name, tensor in iter_tensors(container, adapter, transient=True):
        is_buffer = name in owner._buffers
        is_parameter, where = not is_buffer, owner._buffers if is_buffer else parameter_dict(owner, name)
        trains = is_parameter and (tensor.requires_grad if never is None else (key, path) not in never)
        root = top if owner is top else None  # a deeper owner may be replaced on the way
        modules = container._modules if path else {adapter: None}
        yield Slot(key, path, owner, name, where, is_parameter, trains, (id(owner), name) in saved, modules, root)


def parameter_dict(owner: nn.Module, name: str) -> dict[str, Any]:
    """Return the dict that holds a module's parameter: `_parameters`, or the module's attributes, where FSDP1 keeps
    views.
    """
    return owner._parameters if name in owner._parameters else owner.__dict__


def container_class(value: object) -> type:
    """Return the class of containers for values like `value`:

    - `ModuleDict` for a module.
    - `dict` for a value that is no tensor (a fact).
    - `BufferDict` for a tensor that is no parameter, transient or not.
    - `TransientParameterDict` for a transient parameter, `nn.ParameterDict` for any other.
    """
    tensor = value.tensor if isinstance(value, Transient) else value
    if isinstance(tensor, nn.Module):
        return ModuleDict
    if not isinstance(tensor, Tensor):
        return dict
    if not isinstance(tensor, nn.Parameter):
        return BufferDict
    return TransientParameterDict if isinstance(value, Transient) else nn.ParameterDict


def container_for(value: object) -> Any:
    """Return a new, empty container for values like `value`.

    A `BufferDict` is persistent unless the value is transient. A `ModuleDict` is graft's lean one.
    """
    kind = container_class(value)
    if kind is BufferDict:
        return BufferDict(persistent=not isinstance(value, Transient))
    return new_lean(ModuleDict) if kind is ModuleDict else kind()


def can_hold(container: object, value: object) -> bool:
    """Return True if a container can store `value`: it is of exactly the class for such values, or an `AnyDict`.

    A fact needs a dict or a subclass of dict.
    """
    kind = container_class(value)
    return isinstance(container, dict) if kind is dict else type(container) in (kind, AnyDict)


def store_value(container: Any, adapter: str, value: Any) -> None:
    """Store a value for an adapter in a container that `can_hold` it. A `Transient` is replaced by its tensor.

    A `BufferDict` and an `AnyDict` also note whether checkpoints and the state dict contain the tensor.
    """
    if isinstance(container, BufferDict):
        container._store_value(adapter, value)
    elif isinstance(value, Transient) and not isinstance(container, AnyDict):
        container[adapter] = value.tensor
    else:
        container[adapter] = value


def adapter_module(container: object, adapter: str) -> nn.Module | None:
    """Return the module that a container (`ModuleDict`, `AnyDict` or dict) has for an adapter; None if it has none, or
    a value that is no module.
    """
    if isinstance(container, (nn.ModuleDict, AnyDict, dict)) and adapter in container:
        value = container[adapter]
        return value if isinstance(value, nn.Module) else None
    return None


def iter_tensors(
    container: object, adapter: str, transient: bool = False
) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Yield (path, owner, attribute, tensor) for each tensor of an adapter in a container.

    For a module, these are its parameters and buffers and those of its children, with paths below the module and
    without the parts of wrappers. Buffers outside the state dict come only if `transient`. For a tensor, the path is ""
    and the owner the container; a tensor outside checkpoints only if `transient`. Yields nothing if the container lacks
    the adapter.
    """
    root = adapter_module(container, adapter)
    if root is not None:
        for prefix, module in walk_unwrapped(root) if root._modules else (("", root),):
            dot = f"{prefix}." if prefix else ""
            for name, p in collect_parameters(module).items():
                yield f"{dot}{name}", module, name, p
            for name, b in module._buffers.items():
                if b is not None and (transient or name not in module._non_persistent_buffers_set):
                    yield f"{dot}{name}", module, name, b
        return
    tensors: Any = container if isinstance(container, (nn.ParameterDict, AnyDict, BufferDict)) else ()
    if adapter in tensors and (transient or is_in_checkpoint(container, adapter)):
        yield "", tensors, adapter, tensors[adapter]


def is_in_checkpoint(container: object, name: str) -> bool:
    """Return True if checkpoints contain the value of a name in a container, which is there.

    A `BufferDict` or `AnyDict` answers by its own notes. For any other container it is True, except for a
    `TransientParameterDict`.
    """
    if isinstance(container, BufferDict):
        return container.is_in_checkpoint(name)
    if isinstance(container, AnyDict):
        return name not in container.transient
    return not isinstance(container, TransientParameterDict)


UPCAST = (  # adapters of these dtypes train in float32 unless the user says otherwise
    torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz,
    getattr(torch, "float8_e8m0fnu", torch.float16),  # from torch 2.7 on
)  # fmt: skip


def move_tensor(t: Tensor, device: torch.device | None, dtype: torch.dtype | None, upcast: bool) -> Tensor:
    """Return `t` moved to `device`. It stays on its device if `device` is None or `t` is on meta.

    A floating tensor is rounded to `dtype` (None: not), and then widened to float32 if `upcast` and its dtype is in
    UPCAST. Integers and complex numbers keep their dtype. Returns `t` itself if nothing changes.
    """
    if t.is_floating_point() or t.is_complex():
        if t.is_floating_point() and dtype is not None:
            t = t.to(dtype)
        if upcast and t.dtype in UPCAST:
            t = t.to(torch.float32)
    return t if device is None or t.device == device or t.is_meta else t.to(device)


class ExactBuffers(nn.Module):
    """A module with buffers that move with the base weight and keep their dtype."""


def place_tensor(
    owner: nn.Module, name: str, device: torch.device | None, dtype: torch.dtype | None, upcast: bool
) -> None:
    """Move and cast a parameter or buffer of a module, as `move_tensor` does.

    A name that is neither is ignored. A changed parameter is replaced by a new one with the same `requires_grad`; a
    buffer is replaced. A parameter that FSDP1 keeps in a flat one stays. Buffers of `ExactBuffers` modules keep their
    dtype. Other buffers are only upcast if a container holds them itself.
    """
    if (p := owner._parameters.get(name)) is not None:
        before = p.data
        data = move_tensor(before, device, dtype, upcast)
        if data is not before:
            owner._parameters[name] = nn.Parameter(data, requires_grad=p.requires_grad)
    elif (b := owner._buffers.get(name)) is not None:
        upcast = upcast and isinstance(owner, (BufferDict, AnyDict))  # as in PEFT: no buffers of an adapter's modules
        owner._buffers[name] = move_tensor(b, device, None if isinstance(owner, ExactBuffers) else dtype, upcast)


def place_tensors(
    container: object, adapter: str, device: torch.device | None, dtype: torch.dtype | None, upcast: bool
) -> None:
    """Move and cast all tensors of an adapter in `container` by `place_tensor`. Integer tensors keep their dtype."""
    for _, owner, name, _ in iter_tensors(container, adapter, transient=True):
        place_tensor(owner, name, device, dtype, upcast)
