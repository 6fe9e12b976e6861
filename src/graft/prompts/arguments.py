# SPDX-License-Identifier: Apache-2.0
"""What a prompt changes in the arguments of a call of the stack: input, cache, masks, positions, types of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from graft.prompts import heads, kv_prefix
from graft.prompts.inside import first_of
from graft.prompts.kv_prefix import per_row
from graft.prompts.masks import widened
from graft.prompts.stack import Stack

# arguments with a number per token, and the number of the prompt's tokens
KINDS = {"token_type_ids": 0, "mm_token_type_ids": 0, "visual_pos_masks": 0, "global_attention_mask": 1}


def put_embeddings(stack: Stack, given: dict[str, Any], batch: int) -> None:
    """Put the prompt's embeddings before the input's, and types of tokens for them."""
    embeds = given.get("inputs_embeds")
    if getattr(stack.config, "hidden_size_per_layer_input", None):
        _put_per_layer(stack, given, batch)
    if embeds is None:
        embeds = stack.words(given["input_ids"])
    assert stack.now.embeddings is not None
    prompt = per_row(stack.now.embeddings, batch).to(device=embeds.device, dtype=embeds.dtype)
    given["inputs_embeds"], given["input_ids"] = torch.cat([prompt, embeds], dim=1), None
    for name, kind in KINDS.items():
        if given.get(name) is not None:
            given[name] = nn.functional.pad(given[name], (stack.now.tokens, 0), value=kind)


def _put_per_layer(stack: Stack, given: dict[str, Any], batch: int) -> None:
    """Put padding's embeddings for the prompt into the per-layer embeddings of Gemma 3n and 4, as for images."""
    module: Any = stack.module
    own = given.get("per_layer_inputs")
    if own is None and given.get("input_ids") is not None:
        own = module.get_per_layer_inputs(given["input_ids"])
    if own is not None:
        padding = torch.full(
            (batch, stack.now.tokens), getattr(stack.config, "pad_token_id", None) or 0, device=own.device
        )
        given["per_layer_inputs"] = torch.cat([module.get_per_layer_inputs(padding), own], dim=1)


def put_keys(stack: Stack, given: dict[str, Any], cache: Any, batch: int) -> None:
    """Put the prompt's keys and values into the cache, a new one if none was given."""
    assert stack.now.keys is not None and stack.now.as_pairs is not None and stack.cache_name is not None
    replayed = stack.now.replays.wanted()
    value = stack.now.replays.apart(stack.now.keys, given) if replayed else stack.now.keys
    pairs = heads.fitted(stack.now.as_pairs(value), stack.key_shapes())
    given[stack.cache_name] = filled = stack.filled(cache, pairs, batch)
    if replayed:
        stack.now.replays.start(kv_prefix.frozen(filled))
    asked = given.get("use_cache")
    if replayed or not (getattr(stack.config, "use_cache", True) if asked is None else asked):
        stack.now.lent = filled
    first, mask = first_of(given), given.get("attention_mask")
    if not stack.causal and not stack.in_pair and mask is None:
        given["attention_mask"] = torch.ones(first.shape[:2], dtype=torch.long, device=first.device)
    elif isinstance(mask, dict) and getattr(stack.config, "_attn_implementation", None) == "sdpa":
        # None would stand for torch's causal mask, in which queries and keys begin together
        causal = torch.ones(first.shape[1], first.shape[1], dtype=torch.bool, device=first.device).tril()
        given["attention_mask"] = {kind: causal[None, None] if m is None else m for kind, m in mask.items()}


def widen(stack: Stack, given: dict[str, Any], total: int, before: int, batch: int) -> None:
    """Extend masks and positions to the prompt's tokens, of which the input of this call has `before`."""
    mask, window = given.get("attention_mask"), getattr(stack.config, "sliding_window", None)
    cuts = kv_prefix.slides(given.get(stack.cache_name or ""))
    if isinstance(mask, dict):
        windows = {kind: window if "sliding" in kind else None for kind in mask}
        given["attention_mask"] = {
            kind: _widened(stack, m, total, before, windows[kind], cuts) for kind, m in mask.items()
        }
    elif mask is not None:
        slides = all("sliding" in kind for kind in getattr(stack.config, "layer_types", None) or ())
        given["attention_mask"] = _widened(stack, mask, total, before, window if slides else None, cuts)
    for name in ("position_ids", "cache_position"):
        positions = given.get(name)
        if positions is not None:
            given[name] = positions + stack.now.tokens
            if before:
                own = torch.arange(before, device=positions.device, dtype=positions.dtype)
                own = own + positions.amin(-1, keepdim=True)  # some models count from 1
                given[name] = torch.cat([own, given[name]], dim=-1)


def _widened(stack: Stack, mask: Any, total: int, before: int, window: int | None, cuts: bool) -> Any:
    now = stack.now
    return widened(mask, now.tokens, total, before, window, cuts, stack.causal, now.covered)


def widen_encoded(stack: Stack, given: dict[str, Any]) -> None:
    """Extend the mask of the encoder's output, where a prompt stands in front of it."""
    mask, hidden = given.get("encoder_attention_mask"), given.get("encoder_hidden_states")
    if mask is not None and hidden is not None and mask.shape[-1] + stack.now.encoded == hidden.shape[1]:
        given["encoder_attention_mask"] = torch.cat([mask.new_ones(*mask.shape[:-1], stack.now.encoded), mask], dim=-1)
