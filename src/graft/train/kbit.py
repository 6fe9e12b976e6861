# SPDX-License-Identifier: Apache-2.0
"""Prepare a quantized model for training with adapters."""

from __future__ import annotations

import gc
import inspect
from typing import Any

import torch
from torch import nn

from graft.core.errors import PeftWarning, warn
from graft.storage import holds_codes
from graft.storage.dense import is_composed
from graft.storage.packed import dtype_is_fixed, is_marked, is_packed

HALF = (torch.float16, torch.bfloat16)


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
        gradient_checkpointing_kwargs: for `model.gradient_checkpointing_enable`, such as {"use_reentrant": False}.
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
    enable = model.gradient_checkpointing_enable
    takes = "gradient_checkpointing_kwargs" in inspect.signature(enable).parameters
    if options and not takes:
        warn(
            f"gradient_checkpointing_kwargs is not supported by {type(model).__name__}: {options} is ignored.",
            PeftWarning,
        )
    enable(**({"gradient_checkpointing_kwargs": options} if takes else {}))


def clear_cache() -> None:
    gc.collect()
    for backend in (torch.cuda, torch.xpu, torch.mps):
        if backend.is_available():  # type: ignore[attr-defined]
            backend.empty_cache()  # type: ignore[attr-defined]
