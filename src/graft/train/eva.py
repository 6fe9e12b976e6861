# SPDX-License-Identifier: Apache-2.0
"""Initialise EVA adapters (arXiv 2410.07170) from data: measure the layers' inputs, then set A, ranks and targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from graft.core.errors import CalibrationError, ConfigError, some, warn
from graft.core.pieces import refuse_pieces
from graft.inject.parts import registry_of
from graft.train.calibration import in_mode, linear_methods
from graft.train.eva_measure import (
    Measure,
    apply,
    forward_fn_dict,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)

PREFIX = "base_model.model."


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: Any = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, Any], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Any = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """Return {layer name: first principal components of its inputs, (rank, in)}, with the ranks that EVA gives out.

    Args:
        model: a PeftModel, whose adapters are off meanwhile, or a base model.
        dataloader: batches, read from the start again until the components have converged.
        peft_config: the LoraConfig; needed for a base model.
        forward_fn: (model, batch) → runs the model.
        prepare_model_inputs_fn: (batch, config) → what the next one gets; None: the batch.
        prepare_layer_inputs_fn: (a layer's positional arguments, what the former made, name) → rows (n, in); None: all
            rows of the first argument; a dict by layer name.
        gather_distributed_inputs: use the inputs of all processes, which then find the same components.

    Raises:
        CalibrationError: no data, batches that are too small, or layers that see nothing of them (named).
        ConfigError: a rank is above the width of a layer's inputs; there is no config.
    """
    registry = registry_of(model)
    if registry is not None:
        registry.check_known([adapter_name])
        peft_config = registry.peft_config[adapter_name] if peft_config is None else peft_config
        prefix = next(name for name, m in model.named_modules() if m is registry.model) + "."
        held = {key: layer for key, layer in registry.layers.items() if adapter_name in layer.methods}
        refuse_pieces(((key, layer.site) for key, layer in held.items()), "EVA measures inputs")
        layers: dict[str, nn.Module] = {f"{prefix}{key}": m for key, m in held.items() if m.op.linear}
        ranks = {f"{prefix}{key}": peft_config.at(key).r for key, m in held.items() if m.op.linear}
    elif peft_config is None:
        raise ConfigError("peft_config is required if model is not a PeftModel")
    else:
        methods = linear_methods(model, peft_config, "eva")
        layers = {key: m.site.module for key, m in methods.items()}
        ranks = {key: m.cfg.r for key, m in methods.items()}
    if isinstance(prepare_layer_inputs_fn, Mapping) and (unknown := sorted({*prepare_layer_inputs_fn} - {*layers})):
        raise ConfigError(
            "prepare_layer_inputs_fn is a mapping but the following module names were not found in the model: "
            f"{some(unknown)}"
        )
    if dist.is_initialized() and gather_distributed_inputs:
        warn(
            "torch.distributed is initialized and `gather_distributed_inputs` is True, therefore EVA initialization "
            "will gather tensors from all ranks. Ensure the model does not receive the same inputs on different ranks."
        )
    measure = Measure(
        model,
        layers,
        ranks,
        peft_config,
        dataloader,
        forward_fn,
        prepare_model_inputs_fn,
        prepare_layer_inputs_fn,
        gather_distributed_inputs,
        show_progress_bar,
    )
    with model.disable_adapter() if registry is not None else nullcontext(), in_mode(model, False):  # type: ignore[operator]
        return measure.state_dict()


@torch.no_grad()
def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: dict[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, Any], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Any = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Give an adapter of init_lora_weights="eva" its first values, and the ranks that go with them.

    Layers that get no rank lose the adapter; the config then names the others. Parameters whose rank changes are new:
    make the optimizer afterwards.

    Args:
        eva_state_dict: what `get_eva_state_dict` returned, in place of data. The others are those of that function.

    Raises:
        ConfigError: the adapter is of another initialisation, several adapters are active, or it is merged.
        CalibrationError: neither data nor a state dict, or one that does not fit. The model is as it was.
    """
    registry = registry_of(model)
    if registry is None:
        raise ConfigError("model must be a PeftModel")
    registry.check_known([adapter_name])
    cfg = registry.peft_config[adapter_name]
    if len(registry.active_adapters) > 1:
        raise ConfigError("`initialize_lora_eva_weights` currently only works with a single active adapter")
    if getattr(cfg, "init_lora_weights", None) != "eva":
        raise ConfigError("`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`")
    if adapter_name in registry.merged_adapters:
        raise ConfigError(f"Adapter '{adapter_name}' is merged: call unmerge_adapter() before it gets other values.")
    if eva_state_dict is None:
        if dataloader is None:
            raise CalibrationError("dataloader is required if eva_state_dict is not provided")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            None,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            adapter_name,
            gather_distributed_inputs,
            show_progress_bar,
        )
    apply(registry, adapter_name, {name.removeprefix(PREFIX): A for name, A in eva_state_dict.items()})
