# SPDX-License-Identifier: Apache-2.0
# Supported inside: rooms may import this module.
"""The carriers of one adapter, and the registry of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

from graft.config.base import PeftConfig
from graft.core.carrier import Carrier
from graft.core.errors import AdapterNotFoundError, AlreadyInjectedError
from graft.core.gate import Gate
from graft.core.layer import AdapterLayer
from graft.core.shared import SharedTensors
from graft.core.wrappers import find_inner_module
from graft.inject.survey import Wrapper, check_model, survey_model
from graft.prompts.base import Prompt
from graft.storage import ExpertBlock

if TYPE_CHECKING:
    from torch import nn

F = TypeVar("F", bound=Callable[..., object])


class ParameterLayerPaths:
    """Where layers stand in a model's names: below layers of other parameters of their module, or of one around it."""

    def __init__(self, layers: Iterable[AdapterLayer]):
        self.nests: dict[str, list[AdapterLayer]] = {}
        for layer in layers:
            if layer.op.opaque:
                self.nests.setdefault(layer.site.path, []).append(layer)
        for path, nest in self.nests.items():
            self.nests[path] = sort_inside_out(nest)

    def path(self, key: str, layer: AdapterLayer | None = None) -> str:
        """Return the path of a layer, or of another carrier at `key`, as it stands in names."""
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
    """Sort layers of parameters of one module as they stand around it: the module's first parameter innermost."""
    layers = list(layers)
    order = ExpertBlock(layers[0].site.module).parameters
    return sorted(layers, key=lambda layer: order.index(layer.site.parameter))


@dataclass
class AdapterCarriers:
    """The carriers of one adapter: layers and wrappers by path, the tensors that all layers share, a prompt."""

    layers: dict[str, AdapterLayer]
    wrappers: dict[str, Wrapper]
    shared: SharedTensors | None = None
    prompt: Prompt | None = None
    all_layers: dict[str, AdapterLayer] | None = None  # of the model, those of other adapters too; None: `layers`

    @property
    def prefix(self) -> str:
        """The beginning of a PeftModel's keys; under a prompt the base model has no tuner around it."""
        return "base_model.model." if self.prompt is None else "base_model."

    def carriers(self) -> Iterator[Carrier]:
        yield from self.layers.values()
        yield from self.wrappers.values()
        if self.shared is not None:
            yield self.shared


HOLDER = "_graft"  # the attribute with the registry of PeftModels and tuners; no base model has one of that name


def get_registry(model: object) -> Any:
    """Return the registry of a PeftModel or tuner; None for any other model.

    Raises:
        TypeError: as `check_model`.
    """
    check_model(model)
    return model.__dict__.get(HOLDER)


def check_no_foreign_adapters(model: nn.Module) -> None:
    """Raise AlreadyInjectedError if a model carries adapters of another package, such as PEFT."""
    configs = getattr(model, "peft_config", None)
    if foreign := sorted(name for name, config in (configs or {}).items() if not isinstance(config, PeftConfig)):
        raise AlreadyInjectedError(
            f"The model carries adapter(s) {foreign} of another package, as PEFT. Take them off by its unload(), and "
            "load them by graft.PeftModel.from_pretrained()."
        )


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the model with adapters within wrappers such as DDP's, FSDP's, DeepSpeed's or torch.compile's."""
    while get_registry(model) is None and (inner := find_inner_module(model)) is not None:
        model = inner
    return model


def find_gate(model: nn.Module) -> Gate | None:
    """Return the gate of a model's calls and changes; None if it has no adapter.

    Raises:
        AlreadyInjectedError: it has adapters of another package.
    """
    model = unwrap_model(model)
    registry = get_registry(model)
    if registry is None:
        check_no_foreign_adapters(model)
        tree = survey_model(model)
        registry = next(iter((*tree.layers.values(), *tree.wrappers.values())), None)
    return None if registry is None else registry.call.gate


def get_gate(model: nn.Module) -> Gate:
    """Return the gate of a model's calls and changes.

    Raises:
        AdapterNotFoundError: it has no adapter.
    """
    gate = find_gate(model)
    if gate is None:
        raise AdapterNotFoundError(f"The model ({type(model).__name__}) carries no adapter.")
    return gate


def run_as_call(function: F) -> F:
    """Decorate a function of a model that reads adapters, such as a save: a call, beside which nothing changes."""

    @wraps(function)
    def run(model: nn.Module, *args: object, **kwargs: object) -> Any:
        gate = find_gate(model)
        with nullcontext() if gate is None else gate.call(f"{function.__name__}()"):
            return function(model, *args, **kwargs)

    return run  # type: ignore[return-value]
