# SPDX-License-Identifier: Apache-2.0
# Supported inside: rooms may import this module.
"""The carriers of one adapter; the registry, the gate and the modes of a model.

Several layers on parameters of one module are nested around each other, by the names that PEFT gives them. A layer's
base weight is that of the innermost module.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

from torch import nn

from graft.config.base import PeftConfig
from graft.core.carrier import Carrier, SharedTensors
from graft.core.containers import BufferDict
from graft.core.errors import (
    AdapterNameError,
    AdapterNotFoundError,
    AlreadyInjectedError,
    UnsupportedLayerError,
    shorten_text,
)
from graft.core.gate import Gate
from graft.core.layer import AdapterLayer
from graft.core.rows import BASE
from graft.core.site import Site
from graft.core.wrappers import find_inner_module
from graft.inject.survey import Wrapper, check_model, survey_model
from graft.prompts.base import Prompt
from graft.storage.experts import ExpertBlock

F = TypeVar("F", bound=Callable[..., object])


class ParameterLayerPaths:
    """The paths of carriers in the names of tensors, in a model with layers of parameters.

    Such layers are around their module and around each other, so that "base_layer" comes into the names.
    """

    def __init__(self, layers: Iterable[AdapterLayer]):
        """Collect the layers with an opaque op in `nests`, a list for each module's path, the innermost first.

        Other layers are ignored.
        """
        self.nests: dict[str, list[AdapterLayer]] = {}
        for layer in layers:
            if layer.op.opaque:
                self.nests.setdefault(layer.site.path, []).append(layer)
        for path, nest in self.nests.items():
            self.nests[path] = sort_inside_out(nest)

    def path(self, key: str, layer: AdapterLayer | None = None) -> str:
        """Return a carrier's path in names: `key` with one "base_layer" for each layer of a parameter around a module
        on it. For a parameter's `layer` only the layers around that one count. Without layers of parameters it is
        `key`.
        """
        if not self.nests:
            return key
        parameter_layer = layer if layer is not None and layer.op.opaque else None
        out: list[str] = []
        above = ""
        for part in (key if parameter_layer is None else parameter_layer.site.path).split("."):
            below = self.nests.get(above, [])
            out += ["base_layer"] * len(below)
            above = f"{above}.{part}" if above else part
            out.append(part)
        if parameter_layer is not None:
            nest = self.nests[above]
            out += ["base_layer"] * (len(nest) - 1 - nest.index(parameter_layer))
        return ".".join(out)


def sort_inside_out(layers: Iterable[AdapterLayer]) -> list[AdapterLayer]:
    """Return the layers of parameters of one module in their order around it.

    The layer of the module's first parameter is first.
    """
    layers = list(layers)
    order = ExpertBlock(layers[0].site.module).parameters
    return sorted(layers, key=lambda layer: order.index(layer.site.parameter))


@dataclass
class AdapterCarriers:
    """The carriers of one adapter: layers and wrappers by path, the tensors that all layers share, and a prompt."""

    layers: dict[str, AdapterLayer]
    wrappers: dict[str, Wrapper]
    shared: SharedTensors | None = None
    prompt: Prompt | None = None
    all_layers: dict[str, AdapterLayer] | None = None  # all of the model, also of other adapters; None: `layers`

    @property
    def prefix(self) -> str:
        """The prefix of a PeftModel's keys: "base_model.model.", or "base_model." for a prompt, since no tuner is
        around that base.
        """
        return "base_model.model." if self.prompt is None else "base_model."

    def carriers(self) -> Iterator[Carrier]:
        """Yield the layers, the wrappers, then the shared tensors if there are any. The prompt is not among them."""
        yield from self.layers.values()
        yield from self.wrappers.values()
        if self.shared is not None:
            yield self.shared


HOLDER = "_graft"  # the attribute with the registry of PeftModels and tuners; no base model has one of that name


def get_registry(model: object) -> Any:
    """Return the registry of a PeftModel or tuner, its attribute `_graft`; None for any other module.

    Raises:
        TypeError: `model` is a class or no module.
    """
    check_model(model)
    return model.__dict__.get(HOLDER)


def check_no_foreign_adapters(model: nn.Module) -> None:
    """Raise AlreadyInjectedError if a value of the mapping `model.peft_config` is no graft PeftConfig, such as one of
    PEFT. The text names these adapters, sorted.

    A model without that attribute, or with a falsy one, passes. Only a mapping can be read.
    """
    configs = getattr(model, "peft_config", None)
    if foreign := sorted(name for name, config in (configs or {}).items() if not isinstance(config, PeftConfig)):
        raise AlreadyInjectedError(
            f"The model carries adapter(s) {foreign} of another package, as PEFT. Take them off by its unload(), and "
            "load them by graft.PeftModel.from_pretrained()."
        )


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the model that has the registry, from within wrappers such as DDP, FSDP, DeepSpeed or torch.compile: the
    outermost module with one.

    Without a registry it is the innermost module that is no wrapper. A model without wrappers is returned itself.
    """
    while get_registry(model) is None and (inner := find_inner_module(model)) is not None:
        model = inner
    return model


def find_gate(model: nn.Module) -> Gate | None:
    """Return the gate between calls and changes of a model; None if it has no adapter.

    Looks into wrappers such as DDP. A model without a registry is surveyed for layers.

    Raises:
        AlreadyInjectedError: the model has adapters of another package.
    """
    model = unwrap_model(model)
    registry = get_registry(model)
    if registry is None:
        check_no_foreign_adapters(model)
        tree = survey_model(model)
        registry = next(iter((*tree.layers.values(), *tree.wrappers.values())), None)
    return None if registry is None else registry.call.gate


def get_gate(model: nn.Module) -> Gate:
    """Return the gate between calls and changes of a model.

    Raises:
        AdapterNotFoundError: it has no adapter.
        AlreadyInjectedError: it has adapters of another package.
    """
    gate = find_gate(model)
    if gate is None:
        raise AdapterNotFoundError(f"The model ({type(model).__name__}) carries no adapter. Inject or load one first.")
    return gate


def run_as_call(function: F) -> F:
    """Decorate a function that reads a model's adapters, such as a save. The model is its first argument.

    The gate counts it as a call, so that no change runs at the same time. A model without adapters has no gate.
    """

    @wraps(function)
    def run(model: nn.Module, *args: object, **kwargs: object) -> Any:
        """Call the function and return its result, within a call of the model's gate if the model has one.

        The call has the function's name.
        """
        gate = find_gate(model)
        with nullcontext() if gate is None else gate.call(f"{function.__name__}()"):
            return function(model, *args, **kwargs)

    return run  # type: ignore[return-value]


def check_no_pieces(sites: Iterable[tuple[str, Site]], what: str) -> None:
    """Raise UnsupportedLayerError if this process has only a piece of one of these sites (path, site): its inputs or
    outputs are cut, or a bias is left to the caller.

    The error counts these layers and names the first. It begins with the given clause, such as "EVA measures inputs".
    """
    cut = [(key, p.style) for key, s in sites if (p := s.piece) is not None and (p.inputs or p.outputs or p.left_out)]
    if cut:
        raise UnsupportedLayerError(
            f"{what} of whole layers, and layer '{cut[0][0]}' is parallel by the style '{cut[0][1]}' ({len(cut)} "
            "layers are). Load the model without tp_plan for this."
        )


@contextmanager
def use_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Within the block, set the whole model to training (True) or eval mode.

    Afterwards each module has its own mode back.
    """
    with ExitStack() as at_end:
        at_end.callback(restore_modes, read_modes(model))
        model.train(training)
        yield


@contextmanager
def restore_modes_on_error(model: nn.Module) -> Iterator[None]:
    """If the block raises, also an interrupt, put the modes of all modules of a model back; the error continues.

    Without an error the modes stay.
    """
    with ExitStack() as on_error:
        on_error.callback(restore_modes, read_modes(model))
        yield
        on_error.pop_all()


def read_modes(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    """Return a list of each module of a model, itself included, with its mode: (module, training)."""
    return [(module, module.training) for module in model.modules()]


def restore_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    """Set the attribute `training` of each module in (module, training), in order, without its children."""
    for module, training in modes:
        module.training = training


_TAKEN = {name for container in (nn.ModuleDict(), nn.ParameterDict(), BufferDict()) for name in dir(container)}
LONGEST_NAME = 255  # bytes
REMEDY = "Choose another name (add_adapter() puts it beside that one), or delete_adapter() it first."


def check_adapter_name(name: str, taken: Sequence[str] = (), remedy: str = REMEDY) -> None:
    """Raise AdapterNameError unless `name` can name a new adapter.

    Not allowed: an empty name or no text, ".", "/" or "\\", "__base__", more than 255 bytes, text that file systems
    cannot encode, NUL, attributes of torch's containers, names in `taken`.

    Args:
        remedy: the second sentence of the error for a taken name.
    """
    why = None
    if not isinstance(name, str) or not name:
        why = f"An adapter needs a non-empty string as its name, got {shorten_text(repr(name))}."
    elif "." in name:
        why = f'module name can\'t contain ".", got: {name}: adapter names are parts of parameter names.'
    elif "/" in name or "\\" in name or name == BASE:
        why = f"'{name}' cannot name an adapter: names become folders, and '{BASE}' means the base model."
    elif not is_file_name(name):
        why = (
            f"{shorten_text(repr(name))} cannot name an adapter: names become folders, and file systems take up to "
            f"{LONGEST_NAME} bytes of valid text without NUL."
        )
    elif name in _TAKEN:
        why = f"attribute '{name}' already exists on torch's containers: give the adapter another name."
    elif name in taken:
        why = f"Adapter with name '{name}' already exists. {remedy}"
    if why is not None:
        raise AdapterNameError(why)


def is_file_name(name: str) -> bool:
    """Return True if file systems can encode a name: into 1 to 255 bytes, without NUL."""
    try:
        return 0 < len(os.fsencode(name)) <= LONGEST_NAME and "\0" not in name
    except UnicodeEncodeError:
        return False


MANY = 10_000  # new objects; below this the collector searches them in a few ms


@contextmanager
def pause_collector() -> Iterator[None]:
    """Pause the garbage collector for the block; switch it on afterwards if it was on.

    After more than 10,000 new objects, they move to the oldest generation, unless the caller has frozen objects.
    Otherwise Python would search them at once, as young: 0.4 s of 1.1 s for 10,000 modules. An injection makes no
    garbage.
    """
    enabled, before = gc.isenabled(), gc.get_count()[0]
    gc.disable()
    try:
        yield
    finally:
        # unfreezing would undo a caller's freeze
        if enabled and gc.get_count()[0] - before > MANY and not gc.get_freeze_count():
            gc.freeze()
            gc.unfreeze()
        if enabled:
            gc.enable()


def find_carriers(model: nn.Module, adapter: str) -> tuple[AdapterCarriers, str, nn.Module, Any]:
    """Return the carriers of an adapter, the prefix of its keys, the base model, and the config, None if there is none.

    Wrappers such as DDP are skipped. The prefix is "model." for a tuner, "" for a model without a registry, and else
    that of a PeftModel. A model without a registry is surveyed.

    Raises:
        AdapterNotFoundError: the model has no such adapter.
        AlreadyInjectedError: it has adapters of another package.
    """
    model = unwrap_model(model)
    registry = get_registry(model)
    if registry is not None:
        registry.check_known([adapter])
        parts = registry.parts_of(adapter)
        is_tuner = getattr(registry, "holder", None) is model
        return parts, "model." if is_tuner else parts.prefix, registry.model, registry.peft_config[adapter]
    check_no_foreign_adapters(model)
    tree = survey_model(model)
    layers = {k: layer for k, layer in tree.layers.items() if adapter in layer.methods}
    wrappers = {k: w for k, w in tree.wrappers.items() if adapter in w.adapters}
    if not layers and not wrappers:
        raise AdapterNotFoundError(f"Adapter {adapter} not found: no layer of the model carries it.")
    return AdapterCarriers(layers, wrappers, all_layers=tree.layers), "", model, get_config(model, adapter)


def get_config(model: nn.Module, adapter: str) -> Any:
    """Return an adapter's config from the model's `peft_config`; None if there is none."""
    return (getattr(model, "peft_config", None) or {}).get(adapter)
