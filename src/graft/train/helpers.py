# SPDX-License-Identifier: Apache-2.0
"""Helpers of training scripts for devices, dtypes, labels and FSDP."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from graft.core.effect import LowRank
from graft.core.errors import PeftWarning, warn
from graft.core.layer import AdapterLayer
from graft.prompts.base import Prompt
from graft.prompts.base import shift_tokens_right as shift_tokens_right

PROMPT_ENCODERS = ("PrefixEncoder", "PromptEncoder", "PromptEmbedding", "CartridgeEncoder")


def infer_device() -> str:
    """Return the first available device type of cuda, mps, mlu, xpu, npu and cpu."""
    for name in ("cuda", "mps", "mlu", "xpu", "npu"):
        backend = getattr(torch, name, None)
        if backend is not None and backend.is_available():
            return name
    return "cpu"


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast frozen parameters to `dtype`, trainable ones to float32; in place."""
    for p in model.parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else dtype)


# FSDP


def fsdp_auto_wrap_policy(model: nn.Module) -> Any:
    """Return an auto_wrap_policy for FSDP1: trainable leaves by themselves, transformer layers and prompts whole.

    A leaf of an adapter is a unit only if its method calls it: FSDP gathers a unit for a call. Other tensors of
    adapters stay in the unit of their transformer layer, beside frozen weights, which takes use_orig_params=True.

    The environment variable FSDP_TRANSFORMER_CLS_TO_WRAP names the layers' classes, else the model does.

    Raises:
        TypeError: the model has no layer of a class that the variable names.
    """
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    layers = transformer_layers(model)
    read, methods = read_by_methods(model)
    if methods:
        warn(
            f"FSDP needs use_orig_params=True for {', '.join(methods)}, which reads tensors without a call of a module "
            "of theirs, so that they share a flat parameter with frozen weights. fully_shard (FSDP2) takes any method.",
            PeftWarning,
        )
    return partial(
        _or_policy,
        policies=[
            partial(lambda_auto_wrap_policy, lambda_fn=lambda m: m not in read and is_trainable_leaf(m)),
            partial(lambda_auto_wrap_policy, lambda_fn=lambda m: isinstance(m, Prompt)),
            partial(transformer_auto_wrap_policy, transformer_layer_cls=layers),
        ],
    )


def read_by_methods(model: nn.Module) -> tuple[set[nn.Module], list[str]]:
    """Return the modules with tensors of adapters that nobody calls, and the methods whose trainable tensors are there
    beside frozen weights."""
    read: set[nn.Module] = set()
    names: dict[str, None] = {}
    for module in model.modules():
        if isinstance(module, Prompt):
            read.update(m for m in module.modules() if m is not module)
        if not isinstance(module, AdapterLayer):
            continue
        for adapter, method in module.methods.items():
            effect = method.effect
            calls = isinstance(effect, LowRank) and effect.additive and not effect.reads
            for slot in module.slots(adapter):
                if not (calls and is_leaf(slot.owner)):
                    read.add(slot.owner)
                    if slot.tensor.requires_grad:
                        names[type(method).__name__] = None
    return read, list(names)


def is_leaf(module: nn.Module) -> bool:
    return not module._modules and isinstance(getattr(module, "weight", None), Tensor)


def is_trainable_leaf(module: nn.Module) -> bool:
    return is_leaf(module) and module.weight.requires_grad  # type: ignore[union-attr,return-value]


def transformer_layers(model: nn.Module) -> set[type[nn.Module]]:
    asked = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    names = set(asked.split(",")) if asked else no_split_modules(model)
    found = {type(m).__name__: type(m) for m in model.modules()}
    if missing := sorted(names - set(found)):
        raise TypeError(
            f"Could not find the transformer layer class to wrap in the model: {', '.join(missing)}. Set "
            "FSDP_TRANSFORMER_CLS_TO_WRAP to the names of its layer classes."
        )
    return {found[n] for n in names | (set(PROMPT_ENCODERS) & set(found))}


def no_split_modules(model: nn.Module) -> set[str]:
    """Return the names of classes that must stay on one device, as the transformers models in `model` say."""
    return {name for m in model.modules() for name in getattr(m, "_no_split_modules", None) or ()}
