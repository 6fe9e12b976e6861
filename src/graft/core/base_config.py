# SPDX-License-Identifier: Apache-2.0
"""Facts about a base model: its config (an object as transformers has, a dataclass, a dict, or none) and its
embeddings.
"""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from typing import Any

from torch import nn


def model_config(model: nn.Module) -> dict[str, object]:
    """Return the `config` of a model as a dict.

    An object with `to_dict` is converted by it, a dataclass by `dataclasses.asdict`; a dict is returned as it is. For
    any other value, or none, the dict is `{"model_type": "custom"}`.
    """
    config = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        return config.to_dict()  # type: ignore[union-attr,no-any-return]
    if is_dataclass(config) and not isinstance(config, type):
        return asdict(config)
    return config if isinstance(config, dict) else {"model_type": "custom"}


def model_type(model: nn.Module) -> str:
    """Return the name of the architecture. Methods choose default targets by it.

    It is `config.model_type` if that is a string, else `str` of the entry "model_type" of `model_config(model)`.
    Without either it is "custom".
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return kind if isinstance(kind, str) else str(model_config(model).get("model_type", "custom"))


def text_config(model: object) -> Any:
    """Return the config of the model's text part (`config.get_text_config()`).

    Returns the whole config if it has no such function, or if the function raises ValueError because the model has
    several text parts, such as an encoder and a decoder. Returns None if the model has no config. Nothing is copied.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        return config
    try:
        return config.get_text_config()
    except ValueError:
        return config


def input_embeddings(model: Any) -> nn.Module | None:
    """Return the module of `model.get_input_embeddings()`.

    Returns None if the model lacks that function, if it raises NotImplementedError (models of sound or images), or if
    it returns no module (Perceiver returns a parameter).
    """
    if not hasattr(model, "get_input_embeddings"):
        return None
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return embeddings if isinstance(embeddings, nn.Module) else None


def output_embeddings(model: Any) -> nn.Module | None:
    """Return the result of `model.get_output_embeddings()`, the head over the vocabulary; None if the model lacks the
    function.

    Errors of the model's own function pass on.
    """
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def count_tokens(embeddings: nn.Module | None) -> int | None:
    """Return the number of rows of embeddings or of an output head: one per token.

    It is `num_embeddings`; if that is missing or 0, `out_features`. Returns None for a value that is no int, or without
    a module.
    """
    n = getattr(embeddings, "num_embeddings", None) or getattr(embeddings, "out_features", None)
    return n if isinstance(n, int) else None
