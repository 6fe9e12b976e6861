# SPDX-License-Identifier: Apache-2.0
"""Keys and values of a prompt, in transformers' caches: how many heads each layer takes, and which this process has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graft.core.errors import warn
from graft.core.ops import find_op
from graft.kernels.cuts import Cut, cut_tensor
from graft.storage.find import innermost
from graft.storage.shared_work import find_piece

Shape = tuple[int, int]  # heads, head_dim


def key_shapes(stack: nn.Module) -> list[Shape | None] | None:
    """Return (heads, head size) of the keys in each layer, in the order of `layer_idx`; None in place of a layer that
    shares keys.

    Only modules with an int `layer_idx` and an int `head_dim` count. Heads are `k_proj.out_features` divided by
    `head_dim`. A layer shares keys if it says so, or if it has a q_proj and no k_proj. Others without
    `k_proj.out_features` do not count. Return None for all if the found layers are not 0, 1, … without a gap, or there
    is none.
    """
    shapes: dict[int, Shape | None] = {}
    for module in stack.modules():
        index, size, keys = (getattr(module, name, None) for name in ("layer_idx", "head_dim", "k_proj"))
        if not isinstance(index, int) or not isinstance(size, int):
            continue
        weight = getattr(keys, "out_features", None)
        if getattr(module, "is_kv_shared_layer", False) or (keys is None and hasattr(module, "q_proj")):
            shapes[index] = None
        elif weight is not None:
            shapes[index] = (weight // size, size)
    n = len(shapes)
    return [shapes[i] for i in range(n)] if n and set(shapes) == set(range(n)) else None


def head_cuts(stack: nn.Module) -> dict[int, Cut]:
    """Return, by layer, the cut of the heads for layers that have only some of their heads on this process; {} without
    any.

    It is the cut of the outputs of `k_proj`, in heads: its size is divided by `head_dim`. One that cuts through a head
    is left out. Only modules with ints `layer_idx` and `head_dim` and a `k_proj` count.
    """
    cuts: dict[int, Cut] = {}
    for module in stack.modules():
        index, size, keys = (getattr(module, name, None) for name in ("layer_idx", "head_dim", "k_proj"))
        if isinstance(index, int) and isinstance(size, int) and keys is not None:
            keys = innermost(keys)
            piece = find_piece(keys, find_op(keys))
            if piece is not None and piece.outputs is not None and piece.outputs.chunk % size == 0:
                cuts[index] = piece.outputs._replace(size=piece.outputs.size // size)
    return cuts


def unclear_heads(stack: nn.Module) -> str | None:
    """Return, for an error, the first projection in an attention, other than a direct `k_proj`, with outputs cut over
    processes.

    The text names it and its style. Attentions are modules with an int in `layer_idx`. None if there is none.
    """
    for module in stack.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            for name, child in module.named_modules():
                piece = None if name == "k_proj" else find_piece(child, find_op(child))
                if piece is not None and piece.outputs is not None:
                    return f"'{name}', parallel by the style '{piece.style}'"
    return None


def cut_heads(pairs: Pairs, cuts: dict[int, Cut]) -> Pairs:
    """Return the pairs with the heads that this process has, along dimension 1; None and layers without a cut stay."""
    return [
        p if p is None else (cut_tensor(p[0], cuts.get(i), 1), cut_tensor(p[1], cuts.get(i), 1))
        for i, p in enumerate(pairs)
    ]


def fit_pairs(pairs: list[tuple[Tensor, Tensor]], shapes: list[Shape | None] | None) -> Pairs:
    """Return for each layer the pair that it can hold, or None.

    A pair is cut to its first heads and numbers if the layer has fewer or smaller heads. It is None if the layer has
    more or larger heads, or shares keys. `shapes=None` gives all pairs unchanged; otherwise pairs beyond the shapes are
    left out. Gives one warning that lists the layers that are skipped.

    Raises:
        ValueError: no layer can hold its pair.
    """
    if shapes is None:
        return list(pairs)
    out: Pairs = []
    skipped = []
    for i, (pair, shape) in enumerate(zip(pairs, shapes)):
        size = pair[0].shape[1], pair[0].shape[3]
        if shape is None or shape[0] > size[0] or shape[1] > size[1]:
            out.append(None)
            skipped.append(i)
        else:
            out.append(pair if shape == size else tuple(t[:, : shape[0], :, : shape[1]] for t in pair))  # type: ignore[arg-type]
    if len(skipped) == len(out):
        raise ValueError(
            "Prefix tuning skipped every layer because none has keys and values in the prompt's shape: "
            f"{pairs[0][0].shape[1]} heads of {pairs[0][0].shape[3]}. Use PROMPT_TUNING or P_TUNING."
        )
    if skipped:
        done = [i for i in range(len(out)) if i not in skipped]
        warn(
            f"Prefix tuning injected into layers {done}; skipped {skipped} due to KV shape mismatch or shared-KV "
            "layers."
        )
    return out


Pairs = list[tuple[Tensor, Tensor] | None]  # key and value of each layer, (batch, heads, tokens, head_dim)


def count_tokens(cache: Any) -> int:
    """Return how many tokens a cache holds: that of its first layer with any; 0 for None or if no layer has any.

    Layers that hold a state instead of tokens are skipped. Of an encoder-decoder cache self-attention counts. Of a
    tuple or list of (key, value) only the first pair counts. A cache without layers answers by `get_seq_length()`.
    """
    if cache is None:
        return 0
    if isinstance(cache, (tuple, list)):
        return cache[0][0].shape[-2] if cache and cache[0] is not None else 0
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", None)
    if layers is None:
        return int(cache.get_seq_length())
    # the first layer may hold a state instead of tokens
    return int(next((n for layer in layers if holds_tokens(layer) and (n := layer.get_seq_length())), 0))


def holds_tokens(layer: object) -> bool:
    """Return True if a layer of a cache holds keys and values: it has a method `get_seq_length`."""
    return hasattr(layer, "get_seq_length")


def is_static(cache: object) -> bool:
    """Return True if a cache, or its part for self-attention, has room for a fixed number of tokens only:
    `is_compileable`. None and objects without that attribute give False.
    """
    return bool(getattr(getattr(cache, "self_attention_cache", cache), "is_compileable", False))


def has_sliding_window(cache: object) -> bool:
    """Return True if a cache, or its part for self-attention, has a layer that keeps only the tokens of a sliding
    window (`is_sliding`). An object without layers has none.
    """
    inner = getattr(cache, "self_attention_cache", cache)
    return any(getattr(layer, "is_sliding", False) for layer in getattr(inner, "layers", ()))


def new_cache(config: Any, with_encoder: bool) -> object:
    """Make an empty DynamicCache for the config; with `with_encoder` an EncoderDecoderCache of two, for self-attention
    and cross-attention.
    """
    from transformers import DynamicCache, EncoderDecoderCache

    inner = DynamicCache(config=config)
    return EncoderDecoderCache(inner, DynamicCache(config=config)) if with_encoder else inner


def fill_cache(cache: Any, pairs: Pairs, batch: int, dtype: torch.dtype, devices: list[torch.device]) -> object:
    """Put the pairs into an empty cache, one row per sample, and return it. Layers with None stay empty.

    Keys and values are cast to `dtype` and moved to the layer's device. Of an encoder-decoder cache self-attention is
    filled.
    """
    inner = getattr(cache, "self_attention_cache", cache)
    for i, pair in enumerate(pairs):
        if pair is not None:
            k, v = (per_row(t.to(dtype=dtype, device=devices[i]), batch) for t in pair)
            inner.update(k, v, i)
    return cache


def per_row(t: Tensor, batch: int) -> Tensor:
    """Return one row per sample, (batch, …): a view of the one row, or each row repeated for the beams of its sample,
    batch // rows times; the division is not checked.
    """
    return t.expand(batch, *t.shape[1:]) if len(t) == 1 else t.repeat_interleave(batch // len(t), dim=0)


def freeze_cache(cache: Any) -> Any:
    """Replace each layer's `update` of a filled cache by one that stores nothing, and return the cache.

    A layer may then run again in a backward pass. The new `update` returns the prompt's keys and values followed by the
    call's. Of an encoder-decoder cache only self-attention is changed.
    """
    for layer in getattr(cache, "self_attention_cache", cache).layers:
        layer.update = _Reading(layer.keys, layer.values)
    return cache


def copy_for_run(cache: Any) -> Any:
    """Return a frozen cache for one run of a layer: itself, or of an encoder-decoder one a pair with an empty cache for
    cross-attention.
    """
    inner = getattr(cache, "self_attention_cache", None)
    return cache if inner is None else type(cache)(inner, type(inner)())


class _Reading:
    """A function in place of a cache layer's `update`, which stores nothing."""

    def __init__(self, keys: Any, values: Any):
        """Keep the prompt's keys and values; keys that are no tensor mean that the layer has no prompt."""
        self.keys, self.values = keys, values

    def __call__(self, keys: Tensor, values: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Return the prompt's keys and values followed by the call's; the call's alone for a layer without prompt."""
        if not isinstance(self.keys, Tensor):  # this layer got no prompt
            return keys, values
        return torch.cat([self.keys, keys], dim=-2), torch.cat([self.values, values], dim=-2)
