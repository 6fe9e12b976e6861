# SPDX-License-Identifier: Apache-2.0
"""Prepare LoRA-GA (arXiv 2407.05000): gradients of the weights that will be adapted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from graft.core.errors import CalibrationError, ConfigError
from graft.methods.lora.loraga import GRADIENT
from graft.train.calibration import in_mode, linear_methods, of_file, require_all, store, stored


def preprocess_loraga(
    model: nn.Module, lora_config: Any, train_step: Callable[[], Any], cache_file: str | None = None
) -> None:
    """Estimate what `get_peft_model` with init_lora_weights="lora_ga" begins with; call it with the same model, config.

    Each targeted linear layer gets an attribute `_peft_loraga_grad`, which the initialisation uses up. A config without
    target_modules gets those of the architecture.

    Args:
        train_step: runs forward and backward, once or more often: gradients are averaged. No optimizer step.
        cache_file: gradients are read from here if the file exists, and written otherwise.

    Raises:
        CalibrationError: a layer got no gradient, or one that is not finite.
        ConfigError: the config is not of LoRA-GA, or a layer is quantized.
        CheckpointError: the cache is damaged, or of another model.
    """
    if lora_config.lora_ga_config is None:
        raise ConfigError(
            "If you want to use LoRA-GA, please initialize the LoraConfig with init_lora_weights='lora_ga' and "
            "lora_ga_config=LoraGAConfig(...)."
        )
    methods = linear_methods(model, lora_config, "lora_ga")
    for key, m in methods.items():
        if not m.site.store.exact:
            raise ConfigError(
                f"LoRA-GA does not support quantized models. Found quantized module: '{key}': it has no gradient."
            )
    found = stored(cache_file)
    if found is not None:
        made = {key: of_file(found, f"{key}.{GRADIENT}", cache_file) for key in methods}
    else:
        made = gradients_of(model, methods, train_step)
        store(cache_file, {f"{key}.{GRADIENT}": G for key, G in made.items()})
    for key, m in methods.items():
        setattr(m.site.module, GRADIENT, made[key].to(m.site.store.where(m.site.module)[0]))


def gradients_of(model: nn.Module, methods: dict[str, Any], train_step: Callable[[], Any]) -> dict[str, Tensor]:
    """Return the mean gradient of each weight, as the layer stores it. Parameters are left as they were."""
    weights = {key: getattr(m.site.module, m.site.parameter) for key, m in methods.items()}
    trained = {p: (p.requires_grad, p.grad) for p in model.parameters()}
    calls = dict.fromkeys(methods, 0)

    def count(key: str) -> Callable[..., None]:
        def came(_: Tensor) -> None:
            calls[key] += 1

        def ran(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            if output.requires_grad:  # not in a first pass under reentrant checkpointing
                output.register_hook(came)

        return ran

    hooks = []
    try:
        for p in trained:
            p.requires_grad, p.grad = False, None
        for key, m in methods.items():
            weights[key].requires_grad = True
            hooks.append(m.site.module.register_forward_hook(count(key)))
        with in_mode(model, True), torch.enable_grad():
            train_step()
        seen = [key for key, W in weights.items() if W.grad is not None and calls[key]]
        require_all(methods, seen, "gradient")
        made = {key: W.grad.detach() / calls[key] for key, W in weights.items()}
    finally:
        for handle in hooks:
            handle.remove()
        for p, (requires, grad) in trained.items():
            p.requires_grad, p.grad = requires, grad
    broken = [key for key, G in made.items() if not G.isfinite().all()]
    if broken:
        raise CalibrationError(f"The gradient of layer '{broken[0]}' is not finite: check the data and the loss.")
    return made
