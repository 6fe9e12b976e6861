# SPDX-License-Identifier: Apache-2.0
"""The marks of quantized models and parameters, as transformers and bitsandbytes set them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from graft.storage.dense import NUMBERS, PLAIN

FLAGS = ("is_loaded_in_8bit", "is_loaded_in_4bit")
FIXED = ("gptq", "aqlm", "eetq", "hqq", "torchao")  # quantization formats that fix the dtype of all other weights
PACKED = ("Params4bit",)  # types of parameters whose dtype is only that of their storage


def is_packed(p: nn.Parameter) -> bool:
    return type(p).__name__ in PACKED


def dtype_is_fixed(model: nn.Module) -> bool:
    method = getattr(model, "quantization_method", None)
    return getattr(method, "value", method) in FIXED or bool(getattr(model, "hqq_quantized", False))


def is_marked(model: nn.Module) -> bool:
    """Say whether the one who loaded a model says that it is quantized."""
    return dtype_is_fixed(model) or any(getattr(model, flag, False) for flag in (*FLAGS, "is_quantized"))


def dtype_beside(parameters: Iterable[Tensor]) -> torch.dtype | None:
    """Return the dtype of the first parameter that is not packed: most likely that of a model's hidden states."""
    return next((p.dtype for p in parameters if type(p) in PLAIN and p.dtype in NUMBERS), None)


def unmark(model: Any) -> None:
    """Take the marks off a model that holds nothing packed any more, so that it is saved as a plain one."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    for flag in FLAGS:
        if getattr(model, flag, False):
            setattr(model, flag, False)
