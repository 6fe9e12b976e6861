# SPDX-License-Identifier: Apache-2.0
"""One walk of a model: its modules by path, and the layers and wrappers that adapters have put there."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from graft.core import merging
from graft.core.carrier import carrier_of, layer_in
from graft.core.layer import AdapterLayer
from graft.core.ops import Opaque, find_op
from graft.core.site import Site
from graft.core.table import TypeTable
from graft.inject.saved import ModulesToSaveWrapper
from graft.inject.tokens import TrainableTokensWrapper
from graft.storage import find_store, find_tensor_store

Wrapper = ModulesToSaveWrapper | TrainableTokensWrapper
Place = tuple[nn.Module, str]  # (parent, attribute)


@dataclass
class Tree:
    """The result of one walk of a model."""

    modules: dict[str, nn.Module] = field(default_factory=dict)  # by path; adapter layers and wrappers are leaves
    places: dict[str, Place] = field(default_factory=dict)
    layers: dict[str, AdapterLayer] = field(default_factory=dict)
    wrappers: dict[str, Wrapper] = field(default_factory=dict)
    owners: dict[nn.Parameter, int] = field(default_factory=dict)  # number of the base's modules that hold a parameter
    vacant: list[tuple[Place, nn.Module]] = field(default_factory=list)  # (place, base) where no adapter is left
    parameters: int = 0
    checkpointing: bool = False  # some module has gradient checkpointing switched on

    @cached_property
    def paths(self) -> dict[nn.Module, str]:
        """The path of each module."""
        return {module: path for path, module in self.modules.items()}


def survey(model: nn.Module) -> Tree:
    """Walk `model` once, but not into layers and wrappers. One without adapters counts as the module beneath it."""
    tree = Tree()
    seen: set[nn.Module] = set()

    modules, places, owners = tree.modules, tree.places, tree.owners
    numbers = 0

    def visit(module: nn.Module, path: str) -> None:
        for name, child in module._modules.items():
            if child is None:
                continue
            count(child)
            if child in seen:
                continue
            seen.add(child)
            key = f"{path}.{name}" if path else name
            modules[key] = child
            places[key] = (module, name)
            look_into(child, key)

    def count(module: nn.Module) -> None:
        nonlocal numbers
        if module.__dict__.get("gradient_checkpointing"):
            tree.checkpointing = True
        for p in module._parameters.values():
            if p is not None:
                n = owners[p] = owners.get(p, 0) + 1
                if n == 1:
                    numbers += p.numel()

    def look_into(module: nn.Module, path: str) -> None:
        if (carrier := carrier_of(module)) is not None:
            wrapped(carrier, path)
        elif module._modules:
            visit(module, path)

    def shared(layer: AdapterLayer) -> None:
        base = layer.base_layer
        for part in base.modules() if base._modules else (base,):
            count(part)
        if layer.state.undo and (tied := merging.tied_weight(layer)) is not None:
            owners[tied] = owners.get(tied, 0) + 1

    def wrapped(module: Any, path: str) -> None:
        base, layer = module.base_module, module.adapter_layer
        if not module.adapters:
            if not path:  # the model itself
                return
            tree.vacant.append((places[path], base))
            seen.add(base)
            modules[path] = base
            count(base)
            look_into(base, path)
            return
        (tree.layers if layer is module else tree.wrappers)[path] = module
        if layer is not None:
            shared(layer)
        else:
            for part in base.modules():
                count(part)

    count(model)
    look_into(model, "")
    tree.parameters = numbers
    return tree


def uncovered(module: nn.Module | None) -> nn.Module | None:
    """Return a module as a survey shows it: the one beneath a layer or wrapper without adapters, else itself."""
    while (carrier := carrier_of(module)) is not None and not carrier.adapters:
        module = carrier.base_module
    return module


def site_of(key: str, module: nn.Module, tree: Tree) -> Site:
    layer = layer_in(module)
    if layer is not None:
        return layer.site  # type: ignore[no-any-return]
    weight = module._parameters.get("weight")
    shared = weight is not None and tree.owners.get(weight, 0) > 1
    return Site(key, module, find_op(module), find_store(module), shared=shared)


def parameter_site(key: str, module: nn.Module, name: str, tree: Tree) -> Site:
    """Return the site of one parameter of a module that no op knows."""
    weight = module._parameters[name]
    shared = weight is not None and tree.owners.get(weight, 0) > 1
    return Site(f"{key}.{name}", module, Opaque(name), find_tensor_store(module, name), name, shared)


# types of modules that read their children's weights and do not call them
READERS: TypeTable[str] = TypeTable(
    {"torch.nn.modules.activation.MultiheadAttention": "reads its weight without calling it"}
)


def never_called(key: str, tree: Tree) -> str | None:
    """Say why an adapter on this module would have no effect; None if it would have one."""
    parent = tree.places[key][0]
    why = READERS.find(type(parent))
    return None if why is None else f"Its parent, a {type(parent).__name__}, {why}"


def kind_of(module: nn.Module) -> str:
    carrier = carrier_of(module)
    own = carrier is None or carrier.adapter_layer is not carrier
    return type(module).__name__ if own else str(carrier.site.type_name)
