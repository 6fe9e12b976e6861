# SPDX-License-Identifier: Apache-2.0
"""Caches of transformers, and the keys and values of a prompt in them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Pairs = list[tuple[Tensor, Tensor] | None]  # key and value of each layer, (batch, heads, tokens, head_dim)


def length(cache: Any) -> int:
    """Return how many tokens a cache holds."""
    if cache is None:
        return 0
    if isinstance(cache, (tuple, list)):
        return cache[0][0].shape[-2] if cache and cache[0] is not None else 0
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", None)
    if layers is None:
        return int(cache.get_seq_length())
    # the first layer may hold a state instead of tokens
    return int(next((n for layer in layers if holds_tokens(layer) and (n := layer.get_seq_length())), 0))


def holds_tokens(layer: Any) -> bool:
    """Say whether a layer of a cache holds keys and values."""
    return hasattr(layer, "get_seq_length")


def holds_state(layer: Any) -> bool:
    """Say whether a layer of a cache holds only a state, as for linear attention and convolutions."""
    return hasattr(layer, "conv_states") and not holds_tokens(layer)


def is_static(cache: Any) -> bool:
    """Say whether a cache has room for a fixed number of tokens only."""
    return bool(getattr(getattr(cache, "self_attention_cache", cache), "is_compileable", False))


def slides(cache: Any) -> bool:
    """Say whether a cache has layers that keep only the tokens of a sliding window."""
    own = getattr(cache, "self_attention_cache", cache)
    return any(getattr(layer, "is_sliding", False) for layer in getattr(own, "layers", ()))


def new_cache(config: Any, with_encoder: bool) -> Any:
    """Make an empty cache that grows."""
    import inspect

    from transformers import DynamicCache, EncoderDecoderCache

    takes_config = "config" in inspect.signature(DynamicCache.__init__).parameters  # since 4.56
    options = {"config": config} if takes_config else {}
    own = DynamicCache(**options)
    return EncoderDecoderCache(own, DynamicCache(**options)) if with_encoder else own


def fill(cache: Any, pairs: Pairs, batch: int, dtype: torch.dtype, devices: list[torch.device]) -> Any:
    """Put the pairs into an empty cache, one row per sample, and return it."""
    own = getattr(cache, "self_attention_cache", cache)
    for i, pair in enumerate(pairs):
        if pair is not None:
            k, v = (per_row(t.to(dtype=dtype, device=devices[i]), batch) for t in pair)
            own.update(k, v, i)
    return cache


def per_row(t: Tensor, batch: int) -> Tensor:
    """Return one row per sample, from one row for all or from one for each sample before beams."""
    return t.expand(batch, *t.shape[1:]) if len(t) == 1 else t.repeat_interleave(batch // len(t), dim=0)


def frozen(cache: Any) -> Any:
    """Make a filled cache read-only, so that a layer may run again in a backward pass; return it."""
    own = getattr(cache, "self_attention_cache", cache)
    if hasattr(own, "layers"):
        for layer in own.layers:
            layer.update = _Reading(layer.keys, layer.values)
    else:  # before transformers 4.54
        layers = [_Reading(*pair) for pair in zip(own.key_cache, own.value_cache)]
        own.update = lambda keys, values, layer_idx, cache_kwargs=None: layers[layer_idx](keys, values)
    return cache


def again(cache: Any) -> Any:
    """Return a frozen cache for one run of a layer, with an empty cross-attention cache for that run only."""
    own = getattr(cache, "self_attention_cache", None)
    return cache if own is None else type(cache)(own, type(own)())


class _Reading:
    def __init__(self, keys: Any, values: Any):
        self.keys, self.values = keys, values

    def __call__(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not isinstance(self.keys, Tensor):  # this layer got no prompt
            return keys, values
        return torch.cat([self.keys, keys], dim=-2), torch.cat([self.values, values], dim=-2)
