# SPDX-License-Identifier: Apache-2.0
"""Where a base model has what prompts ask for: its input, its layers, its embeddings of words and positions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def first_of(given: dict[str, Any]) -> Any:
    """Return the input: (batch, tokens) or (batch, tokens, dim); None if there is none."""
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    return ids if embeds is None else embeds


def layers_in(module: nn.Module) -> dict[int, nn.Module]:
    """Return a module of each layer by the layer's number, where modules have one (`layer_idx`)."""
    numbered = [(getattr(m, "layer_idx", None), m) for m in module.modules()]
    return {i: m for i, m in numbered if isinstance(i, int)}


def words_in(module: Any) -> nn.Module | None:
    """Return the word embeddings of a model, if it has any."""
    try:
        words = module.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return words if isinstance(getattr(words, "weight", None), Tensor) else None


def positions_in(module: nn.Module) -> int | None:
    """Return the size of a table of position embeddings; None if the model computes positions."""
    for name, m in module.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(m, nn.Embedding) and (leaf == "wpe" or ("position" in leaf and "relative" not in leaf)):
            reserved = m.padding_idx + 1 if m.padding_idx is not None else getattr(m, "offset", 0)
            return m.num_embeddings - reserved
    return None
