# SPDX-License-Identifier: Apache-2.0
"""What EVA runs a model with and sees of it: functions that callers may replace by their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def forward_fn_dict(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: Any) -> Tensor:
    """Return the positions, (n, 2), of tokens that count: not masked, and not without a label."""
    if not isinstance(model_input, Mapping):
        raise TypeError(
            "When using `prepare_model_inputs_fn_language_modeling` inputs must be a dictionary, got "
            f"{type(model_input).__name__}: pass a prepare_model_inputs_fn of your own, or None."
        )
    mask: Any = model_input.get("attention_mask")
    mask = torch.ones_like(model_input["input_ids"]).bool() if mask is None else mask.bool()
    cfg = peft_config.eva_config
    if cfg.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != cfg.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """Return the rows (n, in) of a layer's input at the positions that count."""
    return first_tensor(layer_input, layer_name)[model_input.T.unbind()]


def flat_rows(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    """Return all rows (n, in) of a layer's input."""
    return first_tensor(layer_input, layer_name).flatten(0, -2)


def first_tensor(layer_input: Any, layer_name: str) -> Tensor:
    found = layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input
    if not isinstance(found, Tensor):
        raise TypeError(
            f"unsupported input type {type(found)} for prepare_layer_inputs_fn in layer {layer_name}, please provide a "
            "custom prepare_layer_inputs_fn"
        )
    return found
