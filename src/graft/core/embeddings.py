# SPDX-License-Identifier: Apache-2.0
"""The embeddings that a model names, in the way of transformers."""

from __future__ import annotations

from typing import Any

from torch import nn


def input_embeddings(model: Any) -> nn.Module | None:
    """Return the module that embeds a model's input; None if the model names none, as those of sound or images."""
    if not hasattr(model, "get_input_embeddings"):
        return None
    try:
        return model.get_input_embeddings()  # type: ignore[no-any-return]
    except NotImplementedError:
        return None


def output_embeddings(model: Any) -> nn.Module | None:
    """Return the head on a model's vocabulary; None if the model names none."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
