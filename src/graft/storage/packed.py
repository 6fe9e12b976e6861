# SPDX-License-Identifier: Apache-2.0
"""The marks of quantized models and parameters, as transformers and bitsandbytes set them."""

from __future__ import annotations

from torch import nn

FLAGS = ("is_loaded_in_8bit", "is_loaded_in_4bit")
FIXED = ("gptq", "aqlm", "eetq", "hqq", "torchao")  # quantization formats that fix the dtype of all other weights
PACKED = ("Params4bit",)  # types of parameters whose dtype is only that of their storage


def is_packed(p: nn.Parameter) -> bool:
    return type(p).__name__ in PACKED


def dtype_is_fixed(model: nn.Module) -> bool:
    method = getattr(model, "quantization_method", None)
    return getattr(method, "value", method) in FIXED


def is_quantized(model: nn.Module) -> bool:
    return dtype_is_fixed(model) or any(getattr(model, flag, False) for flag in FLAGS)
