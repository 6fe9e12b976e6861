# SPDX-License-Identifier: Apache-2.0
"""The base model's own config: an object as transformers has, a dataclass, a dict, or none."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass

from torch import nn


def model_config(model: nn.Module) -> dict[str, object]:
    """Return the model's own config as a dict; `{"model_type": "custom"}` if it has none."""
    config = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        return config.to_dict()  # type: ignore[union-attr,no-any-return]
    if is_dataclass(config) and not isinstance(config, type):
        return asdict(config)
    return config if isinstance(config, dict) else {"model_type": "custom"}


def model_type(model: nn.Module) -> str:
    """Return the architecture's name, by which methods know default targets; "custom" if the config has none."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return kind if isinstance(kind, str) else str(model_config(model).get("model_type", "custom"))
