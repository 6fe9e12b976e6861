# SPDX-License-Identifier: Apache-2.0
"""What a base model says of itself: its config (an object as transformers has, a dataclass, a dict, or none) and its
embeddings."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from typing import Any

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


def text_config(model: object) -> Any:
    """Return the part of a model's config that is of its text, else the config; None if the model has none.

    transformers raises a ValueError where there are several, as a text encoder beside a decoder: then it is the whole.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return config
    try:
        return config.get_text_config()
    except ValueError:
        return config


def input_embeddings(model: Any) -> nn.Module | None:
    """Return the module that embeds a model's input; None if the model names none, as those of sound or images, or
    Perceiver, which names a parameter.
    """
    if not hasattr(model, "get_input_embeddings"):
        return None
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return embeddings if isinstance(embeddings, nn.Module) else None


def output_embeddings(model: Any) -> nn.Module | None:
    """Return the head on a model's vocabulary; None if the model names none."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def count_tokens(embeddings: nn.Module | None) -> int | None:
    """Return for how many tokens a model's embeddings, or its head, have rows; None if they do not say."""
    n = getattr(embeddings, "num_embeddings", None) or getattr(embeddings, "out_features", None)
    return n if isinstance(n, int) else None
