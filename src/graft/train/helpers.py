# SPDX-License-Identifier: Apache-2.0
"""Helpers of training scripts for quantized bases, devices, dtypes, labels and FSDP."""

from __future__ import annotations

import gc
import inspect
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from graft import AdapterLayer, PeftWarning
from graft.core.errors import warn
from graft.inject.parts import get_registry, unwrap_model
from graft.inject.survey import survey_model

PROMPT_ENCODERS = ("PrefixEncoder", "PromptEncoder", "PromptEmbedding", "CartridgeEncoder")


def infer_device() -> str:
    """Return the type of the accelerator of this machine, such as "cuda"; "cpu" if there is none."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if device is None else device.type


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast frozen parameters to `dtype` and trainable ones to float32, in place.

    Codes and scales of packed weights keep their dtype.
    """
    for p in survey_model(unwrap_model(model)).find_castable_parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else dtype)


def move_tensors(value: Any, move: Callable[[Any], object]) -> Any:
    """Return a value with the result of `move` in place of each tensor or other object with a method `to` in it.

    Mappings, tuples and lists are rebuilt as the same class, with their items moved. Other values stay.
    """
    if hasattr(value, "to"):
        return move(value)
    if isinstance(value, Mapping):
        return type(value)({k: move_tensors(v, move) for k, v in value.items()})  # type: ignore[call-arg]
    if isinstance(value, (tuple, list)):
        make: Any = getattr(type(value), "_make", type(value))  # a named tuple takes no iterator
        return make(move_tensors(v, move) for v in value)
    return value


# FSDP


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., bool]:
    """Return an auto_wrap_policy for FSDP1: trainable leaves by themselves, transformer layers and prompts whole.

    Units are modules of three kinds:

    - a leaf with a trainable weight, unless `find_uncalled_modules` lists it: FSDP gathers a unit for a call;
    - a prompt of the model: one of the modules of `find_prompts`, not its class;
    - a layer of the classes of `find_transformer_layers`.

    Other tensors of adapters stay in the unit of their transformer layer, next to frozen weights, which takes
    use_orig_params=True. A PeftWarning names methods with such trainable tensors, if there are any.

    Raises:
        TypeError: as `find_transformer_layers`: the model has no layer of a class that FSDP_TRANSFORMER_CLS_TO_WRAP,
            else the model, names.
    """
    from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

    layers, prompts = tuple(find_transformer_layers(model)), find_prompts(model)
    read, methods = find_uncalled_modules(model)
    if methods:
        warn(
            f"FSDP needs use_orig_params=True for {', '.join(methods)}, which reads tensors without calling "
            "their modules, so that they share a flat parameter with frozen weights. Or use fully_shard (FSDP2).",
            PeftWarning,
        )

    def is_unit(module: nn.Module) -> bool:
        """Return True for a transformer layer, a prompt, and a leaf with a trainable weight that is called as a
        module.
        """
        if isinstance(module, layers) or module in prompts:
            return True
        return module not in read and is_leaf(module) and module.weight.requires_grad

    return partial(lambda_auto_wrap_policy, lambda_fn=is_unit)


def find_uncalled_modules(model: nn.Module) -> tuple[set[nn.Module], list[str]]:
    """Return the modules with adapters' tensors that are read without a call of the module, and the class names of
    methods with trainable tensors there, each once.

    These are all modules inside prompts. Of adapted layers they are the owners of tensors of methods without a product
    of modules, or with an effect that reads them, and owners that are no leaves.
    """
    read: set[nn.Module] = {m for prompt in find_prompts(model) for m in prompt.modules() if m is not prompt}
    names: dict[str, None] = {}
    for module in model.modules():
        if not isinstance(module, AdapterLayer):
            continue
        for adapter, method in module.methods.items():
            effect = method.effect
            calls = effect.product is not None and not effect.reads
            for slot in module.slots(adapter):
                if not (calls and is_leaf(slot.owner)):
                    read.add(slot.owner)
                    if slot.tensor.requires_grad:
                        names[type(method).__name__] = None
    return read, list(names)


def find_prompts(model: nn.Module) -> set[nn.Module]:
    """Return the modules that compute the prompts of a model's adapters; none for one without a registry."""
    registry = get_registry(unwrap_model(model))
    parts = [] if registry is None else [registry.parts_of(name) for name in registry.peft_config]
    return {of_adapter.prompt for of_adapter in parts if of_adapter.prompt is not None}


def is_leaf(module: nn.Module) -> bool:
    """Return True for a module without children and with a tensor `weight`."""
    return not module._modules and isinstance(getattr(module, "weight", None), Tensor)


def find_transformer_layers(model: nn.Module) -> set[type[nn.Module]]:
    """Return the classes of transformer layers in a model, with those of PEFT's prompt encoders that it has.

    FSDP_TRANSFORMER_CLS_TO_WRAP names them, separated by commas, else, unset or empty, `_no_split_modules` of the
    model. Names are neither stripped nor dropped, so an empty one between commas is an error.

    Raises:
        TypeError: the model has no module of such a class. The text lists all such names.
    """
    asked = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    names = set(asked.split(",")) if asked else find_no_split_classes(model)
    classes = {type(m).__name__: type(m) for m in model.modules()}
    if missing := sorted(names - set(classes)):
        raise TypeError(
            f"Could not find the transformer layer class to wrap in the model: {', '.join(missing)}. Set "
            "FSDP_TRANSFORMER_CLS_TO_WRAP to the names of its layer classes."
        )
    return {classes[n] for n in names | (set(PROMPT_ENCODERS) & set(classes))}


def find_no_split_classes(model: nn.Module) -> set[str]:
    """Return the names of classes that must stay on one device: `_no_split_modules` of all modules in `model`."""
    return {name for m in model.modules() for name in getattr(m, "_no_split_modules", None) or ()}


# quantized bases


HALF = (torch.float16, torch.bfloat16)
OPTIONS = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")  # in transformers from 5.2x on, before


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, object] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Freeze `model`, widen its half-precision weights (norms, head) to float32, and turn on gradient checkpointing.

    Changes the model in place and returns it.

    Checkpointing is turned on only if the base is quantized, by any method. Scales and codes of packed weights keep
    their dtype, and so does a model that is fixed to one dtype. As in PEFT, a half-precision base that is not quantized
    is widened as well.

    Args:
        gradient_checkpointing_kwargs: for the model's function that turns checkpointing on, such as {"use_reentrant":
            False}.
        auto_clear_cache: give the memory of the replaced weights back to the device.
    """
    inner = unwrap_model(model)
    inner.requires_grad_(False)
    tree = survey_model(inner)
    for p in tree.find_castable_parameters(keep_fixed=True):
        if p.dtype in HALF:
            p.data = p.data.to(torch.float32)
    if auto_clear_cache:
        clear_device_cache()
    if use_gradient_checkpointing and tree.is_quantized:
        enable_checkpointing(model, gradient_checkpointing_kwargs or {})
    return model


def enable_checkpointing(model: nn.Module, options: dict[str, object]) -> None:
    """Turn on gradient checkpointing with `options`, by `gradient_checkpointing_enable` if the model overrides it, else
    by transformers' `activation_checkpointing_enable`, where it exists.

    The reentrant kind, also the default, needs inputs with gradients. The outputs of the input embeddings get them, by
    `enable_input_require_grads` of the model or else a hook that stays.

    Warns if the model's function takes no options, and ignores them.
    """
    if options.get("use_reentrant", True):
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        else:
            model.get_input_embeddings().register_forward_hook(lambda _m, _i, output: output.requires_grad_(True))
    enable, new = model.gradient_checkpointing_enable, getattr(model, "activation_checkpointing_enable", None)
    if new is not None and enable.__module__ == new.__module__:  # else the model overrides the older one
        enable = new
    keywords = [name for name in OPTIONS if name in inspect.signature(enable).parameters]
    if options and not keywords:
        warn(
            f"gradient_checkpointing_kwargs is not supported by {type(model).__name__}: {options} is ignored.",
            PeftWarning,
        )
    enable(**{name: options for name in keywords})


def clear_device_cache() -> None:
    """Collect garbage, and empty the memory caches of CUDA, XPU and MPS, where they are available."""
    gc.collect()
    for backend in (torch.cuda, torch.xpu, torch.mps):
        if backend.is_available():
            backend.empty_cache()
