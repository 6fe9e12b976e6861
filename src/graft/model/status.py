# SPDX-License-Identifier: Apache-2.0
"""The status of a model's adapters: per layer and overall."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import nn

from graft.core.carrier import carrier_of
from graft.core.containers import iter_slots
from graft.core.layer import AdapterLayer
from graft.inject.beside import ModulesToSaveWrapper
from graft.inject.parts import ParameterLayerPaths, check_no_foreign_adapters, get_registry, unwrap_model
from graft.inject.survey import survey_model

T = TypeVar("T")
Irregular = Literal["irregular"]


@dataclass
class TunerLayerStatus:
    """The status of one layer: its adapters, their devices, and the active, merged and trainable ones."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


@dataclass
class TunerModelStatus:
    """The status of all layers together: "irregular" where they differ."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


def common_value(values: list[T]) -> T | Irregular:
    """Return the value that all items of a non-empty list have, or "irregular"."""
    return values[0] if all(v == values[0] for v in values) else "irregular"


def _layers_by_path(model: nn.Module) -> dict[str, AdapterLayer | ModulesToSaveWrapper]:
    """Return adapter layers and modules trained whole, by the paths of PEFT's tuner, in PEFT's order.

    With a PeftModel paths begin with "model.". Several layers on parameters of one module are listed from the outermost
    in, each with a path of its depth. Layers of token rows have their inner name at the end; those that belong to
    another module's rows are left out.
    """
    registry = get_registry(model)
    tree = survey_model(model if registry is None else registry.model)
    prefix = "" if registry is None else "model."
    paths = ParameterLayerPaths(tree.layers.values())
    layers: dict[str, AdapterLayer | ModulesToSaveWrapper] = {}
    for key, module in tree.modules.items():
        carrier: Any = carrier_of(module)
        for layer in reversed(tree.nests.get(key, ())):
            layers[f"{prefix}{paths.path(key, layer)}"] = layer
        if carrier is not None and key not in tree.nests:
            path = f"{prefix}{paths.path(key)}"
            if not carrier.takes_rows:
                layers[path] = carrier
            elif not any(m.lenders for m in carrier.methods.values()):  # else its rows are another's
                layers[f"{path}.{module.inner_name}"] = carrier
    return layers


def unwrap_with_layers(model: nn.Module, caller: str) -> nn.Module:
    """Return the model inside wrappers such as DDP.

    Raises TypeError, with `caller`, for prompts, and AlreadyInjectedError for models with adapters of PEFT. A model
    without adapters passes.
    """
    model = unwrap_model(model)
    check_no_foreign_adapters(model)
    if getattr(get_registry(model), "prompt_encoder", None) is not None:
        raise TypeError(
            f"{caller}() got an invalid PeftModel instance; prompt methods put no adapters on layers: see "
            "model.peft_config and model.prompt_encoder."
        )
    return model


def find_shared_parameters(layer: AdapterLayer | ModulesToSaveWrapper, adapter: str) -> list[nn.Parameter]:
    """Return the parameters of an adapter in the shared containers that are attached to a layer; [] without any."""
    slots = (slot for key in layer.attached for slot in iter_slots(key, layer._modules[key], adapter))
    return [slot.tensor for slot in slots if slot.is_parameter]  # type: ignore[misc]


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """Return the status of each adapter layer and module trained whole, with adapters and devices sorted.

    An adapter's `requires_grad` is "irregular" where its parameters differ, and False without parameters. A layer
    without parameters of the adapter takes those that it shares with other layers.

    Raises:
        ValueError: the model has no adapter layers.
        TypeError: its adapters are prompts, and not on layers.
    """
    model = unwrap_with_layers(model, "get_layer_status")
    out = []
    for key, layer in _layers_by_path(model).items():
        adapters = sorted(layer.adapters)
        grads: dict[str, bool | Irregular] = {}
        devices = {}
        for adapter in adapters:
            parameters = list(layer.parameters_of(adapter)) or find_shared_parameters(layer, adapter)
            grads[adapter] = common_value([p.requires_grad for p in parameters]) if parameters else False
            devices[adapter] = sorted({p.device.type for p in parameters})
        out.append(
            TunerLayerStatus(
                name=key,
                module_type=layer._get_name(),
                enabled=not layer.disable_adapters,
                active_adapters=list(layer.active_adapters),
                merged_adapters=list(layer.merged_adapters),
                requires_grad=grads,
                available_adapters=adapters,
                devices=devices,
                quantization_backend=layer.quantization_backend,
            )
        )
    if not out:
        raise ValueError(
            "No adapter layers found in the model, please ensure that one was injected (get_peft_model, "
            "inject_adapter_in_model) and not unloaded."
        )
    return out


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """Return the status of all layers together, with lists of adapters sorted.

    A field is "irregular" where layers differ. An adapter's `requires_grad` compares only layers that have it.
    `trainable_params` and `total_params` count all parameters of `model`, not only those of layers.

    `adapter_model_type` is the tuner's class. Without a PeftModel `peft_types` is {}, and `adapter_model_type` is
    "None"; `base_model_type` is "other" unless the model is one of transformers.

    Raises:
        ValueError: the model has no adapter layers.
        TypeError: its adapters are prompts, and not on layers.
    """
    model = unwrap_with_layers(model, "get_model_status")
    layers = get_layer_status(model)
    registry = get_registry(model)
    wrapped = registry is not None
    base: nn.Module = registry.model if wrapped else model
    configs = getattr(model, "peft_config", None) or {}
    adapters = sorted({a for s in layers for a in s.available_adapters})
    params = list(model.parameters())
    named = wrapped or any(c.__name__ == "PreTrainedModel" for c in type(base).__mro__)
    return TunerModelStatus(
        base_model_type=type(base).__name__ if named else "other",
        adapter_model_type=type(registry.holder).__name__ if wrapped else "None",
        peft_types={name: c.peft_type.value for name, c in configs.items()} if wrapped else {},
        trainable_params=sum(p.numel() for p in params if p.requires_grad),
        total_params=sum(p.numel() for p in params),
        num_adapter_layers=len(layers),
        enabled=common_value([s.enabled for s in layers]),
        active_adapters=common_value([s.active_adapters for s in layers]),
        merged_adapters=_common_merged(layers),
        requires_grad={a: common_value([s.requires_grad[a] for s in layers if a in s.requires_grad]) for a in adapters},
        available_adapters=adapters,
        devices={a: sorted({d for s in layers for d in s.devices.get(a, ())}) for a in adapters},
        quantization_backend=common_value([s.quantization_backend for s in layers]),
    )


def _common_merged(layers: list[TunerLayerStatus]) -> list[str] | Irregular:
    """Return the merged adapters of all layers in the order of their first layer, [] if none.

    Returns "irregular" if a layer has one of them unmerged; layers without it do not count.
    """
    names = list(dict.fromkeys(n for s in layers for n in s.merged_adapters))
    for s in layers:
        if any(n in s.available_adapters and n not in s.merged_adapters for n in names):
            return "irregular"
    return names
