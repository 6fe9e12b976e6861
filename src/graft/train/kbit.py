# SPDX-License-Identifier: Apache-2.0
"""Prepare a quantized model for training with adapters."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from graft.core.errors import PeftWarning, warn
from graft.storage import holds_codes
from graft.storage.codes import dtype_is_fixed, is_marked, is_packed
from graft.storage.dense import is_composed

HALF = (torch.float16, torch.bfloat16)
OPTIONS = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")  # in transformers from 5.2x on, before


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> nn.Module:
    """Freeze `model`, widen its half-precision weights (norms, head) to float32, and turn on gradient checkpointing.

    Turn on checkpointing only if the base is quantized, by a method that PEFT knows or any other. Scales of packed
    weights keep their dtype. As in PEFT, widen a half-precision base that is not quantized as well. Change the model in
    place and return it.

    Args:
        gradient_checkpointing_kwargs: for the model's function that turns checkpointing on, such as
            {"use_reentrant": False}.
        auto_clear_cache: give the memory of the replaced weights back to the device.
    """
    widen, packed = not dtype_is_fixed(model), [m for m in model.modules() if holds_codes(m)]
    narrow = {p for m in packed for p in kept_as_they_are(m)}
    for p in model.parameters():
        p.requires_grad_(False)
        if widen and p.dtype in HALF and p not in narrow and not is_packed(p):
            p.data = p.data.to(torch.float32)
    if auto_clear_cache:
        clear_cache()
    if use_gradient_checkpointing and (packed or is_marked(model)):
        checkpoint(model, gradient_checkpointing_kwargs or {})
    return model


def kept_as_they_are(m: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a packed layer that keep their dtype: scales; a bias beside a tensor made of others."""
    held = {name: p for name, p in m._parameters.items() if p is not None}
    fixed = any(map(is_composed, held.values()))  # the layer computes in the dtype of that tensor
    return [p for name, p in held.items() if fixed or name != "bias"]


def checkpoint(model: Any, options: dict[str, Any]) -> None:
    """Turn on gradient checkpointing; the reentrant kind needs inputs that require gradients."""
    if options.get("use_reentrant", True):
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        else:
            model.get_input_embeddings().register_forward_hook(lambda _m, _i, output: output.requires_grad_(True))
    enable = switch(model)
    takes = [name for name in OPTIONS if name in inspect.signature(enable).parameters]
    if options and not takes:
        warn(
            f"gradient_checkpointing_kwargs is not supported by {type(model).__name__}: {options} is ignored.",
            PeftWarning,
        )
    enable(**{name: options for name in takes})


def switch(model: Any) -> Callable[..., None]:
    """Return the function of a model that turns checkpointing on: the model's own, or transformers' by its new name."""
    known, new = model.gradient_checkpointing_enable, getattr(model, "activation_checkpointing_enable", None)
    return known if new is None or known.__module__ != new.__module__ else new


def clear_cache() -> None:
    gc.collect()
    for backend in (torch.cuda, torch.xpu, torch.mps):
        if backend.is_available():  # type: ignore[attr-defined]
            backend.empty_cache()  # type: ignore[attr-defined]
