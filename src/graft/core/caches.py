# SPDX-License-Identifier: Apache-2.0
"""Caches of transformers, as a call has them among its arguments: how many tokens they have seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CACHES = ("cache", "past_key_values")  # the argument in transformers from 5.2x on, and before


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """Return the cache among the arguments of a model's forward; None if there is none."""
    return next((arguments[name] for name in CACHES if arguments.get(name) is not None), None)


def tokens_seen(cache: Any) -> int | None:
    """Return how many tokens a cache has seen; None if it does not tell, as one of states alone (Mamba)."""
    layers = getattr(cache, "layers", ())
    if not hasattr(cache, "get_seq_length") or (layers and not any(hasattr(n, "get_seq_length") for n in layers)):
        return None
    return int(cache.get_seq_length())


def has_state(cache: Any) -> bool:
    """Return True if a layer of a cache has the state after the tokens that it has seen."""
    states = [getattr(layer, "has_previous_state", False) for layer in getattr(cache, "layers", ())]
    return any(any(state.values()) if isinstance(state, Mapping) else state for state in states)
