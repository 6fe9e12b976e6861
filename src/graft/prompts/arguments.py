# SPDX-License-Identifier: Apache-2.0
"""Changes of a prompt to the arguments of a call: input, cache, masks, positions, types of tokens, labels."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from graft.core.method import return_unchanged
from graft.prompts import kv_prefix
from graft.prompts.base import IGNORED_LABEL, Prompt, shift_tokens_right
from graft.prompts.kv_prefix import per_row
from graft.prompts.stack import PromptStack, find_first_input


def extend_mask(stack: PromptStack, mask: Tensor, total: int, before: int, window: int | None, cuts: bool) -> Tensor:
    """Return the mask with the tokens of the stack's prompt in front.

    A mask (batch, tokens) gets columns of ones. If the visit says `covered` and the mask has all `total` columns, it is
    returned unchanged. A mask of four dimensions gets columns, and with `before` rows, by causality and window; with
    `window` and `cuts` only its last window - 1 + rows columns stay. Another object, or another number of tokens in
    four dimensions, is returned unchanged.

    Args:
        stack: its visit has the prompt; `causal`: tokens see only those before them.
        mask: (batch, tokens), or (batch, heads, queries, tokens) of numbers to add or of truth values.
        total: the number of tokens with the prompt.
        before: the number of the prompt's tokens in front of the input of this call.
        window: how many tokens back the layers with this mask see; None: to the beginning.
        cuts: the cache of these layers holds no more than the window.

    Raises:
        ValueError: a mask (batch, tokens) has another number of tokens.
    """
    prompt, causal = stack.now.tokens, stack.causal
    tokens = total - prompt
    if isinstance(mask, Tensor) and mask.dim() == 2:
        if stack.now.covered and mask.shape[1] == total:
            return mask
        if mask.shape[1] != tokens:
            raise ValueError(
                f"attention_mask has {mask.shape[1]} columns for {tokens} tokens (and the prompt's "
                f"{prompt}, which it need not cover)."
            )
        return torch.cat([mask.new_ones(len(mask), prompt), mask], dim=1)
    if not isinstance(mask, Tensor) or mask.shape[-1] != tokens:
        return mask
    open_, shut = (0, torch.finfo(mask.dtype).min) if mask.is_floating_point() else (1, 0)
    b, h, q, k = mask.shape
    if before:
        prompt_mask = mask.new_full((), shut) if causal else find_visible_tokens(mask, shut)
        mask = torch.cat([prompt_mask.expand(b, h, before, k), mask], dim=-2)
    rows = before + q
    at = torch.arange(total, device=mask.device)
    back = at[total - rows :, None] - at[:prompt]
    sees = (back >= 0) & (back < (window or total)) if causal else torch.ones_like(back, dtype=torch.bool)
    front = torch.full_like(back, shut, dtype=mask.dtype).masked_fill(sees, open_)
    mask = torch.cat([front.expand(b, h, rows, -1), mask], dim=-1)
    return mask[..., 1 - window - rows :] if window and cuts else mask


def find_visible_tokens(mask: Tensor, shut: float) -> Tensor:
    """Return a mask of the tokens that the prompt may see, (batch, heads, 1, tokens), from one of four dimensions.

    These are all tokens that some token sees. Left out are tokens that see a token which does not see them, such as
    those after a prefix.

    shut: the value of the mask for a pair that does not see.
    """
    sees = mask != shut
    later = (sees & ~sees.transpose(-1, -2)).any(-1)
    return mask.amax(-2, keepdim=True).masked_fill(later[..., None, :], shut)


PADDED = ("CAUSAL_LM", "TOKEN_CLS")  # tasks with a label per token; the prompt's tokens have none


def put_labels(
    model: nn.Module,
    main: PromptStack,
    cfg: Any,
    prompt: Prompt,
    both: bool,
    kwargs: dict[str, Any],
    arguments: dict[str, Any],
) -> Callable[[object], object]:
    """Give the tokens of a prompt of embeddings labels in `kwargs`; return a function for the output of the call.

    A prompt with a loss takes the labels out, and the function adds that loss to the output. Otherwise the function
    returns the output unchanged. Ignored labels are put in front of them if the decoder gets a prompt too, which first
    gets its inputs, or for CAUSAL_LM and TOKEN_CLS. For TOKEN_CLS an attention mask of the labels' shape gets ones, and
    the visit is marked as covered.

    Args:
        main: the stack that the prompt enters; the encoder's, if there are two.
        both: it enters the decoder's as well, and the labels are the decoder's.
        arguments: of the call, for the prompt's loss.
    """
    labels, P = kwargs["labels"], cfg.num_virtual_tokens
    if prompt.replaces_loss:
        del kwargs["labels"]
        return lambda output: with_loss(output, partial(prompt.compute_loss, labels=labels, **arguments))
    if both or cfg.task_type in PADDED:
        if both:
            put_decoder_inputs(model, labels, kwargs)
        kwargs["labels"] = nn.functional.pad(labels, (P, 0), value=IGNORED_LABEL)
        mask = kwargs.get("attention_mask")
        if cfg.task_type == "TOKEN_CLS" and isinstance(mask, Tensor) and mask.shape == labels.shape:
            # some losses leave out masked tokens
            kwargs["attention_mask"] = nn.functional.pad(mask, (P, 0), value=1)
            main.now.covered = True
    return return_unchanged


def put_decoder_inputs(model: nn.Module, labels: Tensor, kwargs: dict[str, object]) -> None:
    """Set `decoder_input_ids` in `kwargs` from the labels as the model would, before the prompt's labels join them.

    Does nothing if the call has decoder inputs. A model without a method for that gets the labels shifted to the right.
    """
    if kwargs.get("decoder_input_ids") is None and kwargs.get("decoder_inputs_embeds") is None:
        if hasattr(model, "prepare_decoder_input_ids_from_labels"):
            ids = model.prepare_decoder_input_ids_from_labels(labels=labels)
        else:  # M2M100, Blenderbot and others do it in their forward only
            ids = shift_tokens_right(labels, model.config.pad_token_id, model.config.decoder_start_token_id)
        kwargs["decoder_input_ids"] = ids


def with_loss(output: Any, loss: Callable[[Tensor], Tensor]) -> object:
    """Return a new output with `loss` of its logits.

    A tuple has the logits as its first item and gets the loss in front. Any other output becomes one of the same class,
    with the loss first in place of another.
    """
    if isinstance(output, tuple):
        return loss(output[0]), *output
    return type(output)(**{"loss": loss(output.logits), **{k: v for k, v in output.items() if k != "loss"}})


# arguments with a number per token, and the number of the prompt's tokens
KINDS = {"token_type_ids": 0, "mm_token_type_ids": 0, "visual_pos_masks": 0, "global_attention_mask": 1}


def put_embeddings(stack: PromptStack, arguments: dict[str, Any], batch: int) -> None:
    """Put the prompt's embeddings before the input's in `arguments`, in place, in the input's device and dtype.

    `input_ids` become None and `inputs_embeds` are set, made by the word embeddings (else AssertionError) if the call
    has none. Token types and the other arguments in `KINDS` get 0 for the prompt's tokens, `global_attention_mask` 1. A
    model with embeddings for each layer gets those of padding for the prompt.
    """
    embeds = arguments.get("inputs_embeds")
    if getattr(stack.config, "hidden_size_per_layer_input", None):
        _put_per_layer(stack, arguments, batch)
    if embeds is None:
        words = stack.words
        assert words is not None
        embeds = words(arguments["input_ids"])
    assert stack.now.embeddings is not None
    prompt = per_row(stack.now.embeddings, batch).to(device=embeds.device, dtype=embeds.dtype)
    arguments["inputs_embeds"], arguments["input_ids"] = torch.cat([prompt, embeds], dim=1), None
    for name, kind in KINDS.items():
        if arguments.get(name) is not None:
            arguments[name] = nn.functional.pad(arguments[name], (stack.now.tokens, 0), value=kind)


def _put_per_layer(stack: PromptStack, arguments: dict[str, Any], batch: int) -> None:
    """Put padding's embeddings before the per-layer embeddings of Gemma 3n and 4, in place, as the model does for
    images.

    Without `per_layer_inputs` they are made from the input ids; without these too, nothing happens. The padding token
    is that of the config, 0 without one.
    """
    module: nn.Module = stack.module
    inputs = arguments.get("per_layer_inputs")
    embeddings = [None] * (len(inspect.signature(module.get_per_layer_inputs).parameters) - 1)  # Gemma 4's takes them
    if inputs is None and arguments.get("input_ids") is not None:
        inputs = module.get_per_layer_inputs(arguments["input_ids"], *embeddings)
    if inputs is not None:
        padding = torch.full(
            (batch, stack.now.tokens), getattr(stack.config, "pad_token_id", None) or 0, device=inputs.device
        )
        arguments["per_layer_inputs"] = torch.cat([module.get_per_layer_inputs(padding, *embeddings), inputs], dim=1)


def put_keys(stack: PromptStack, arguments: dict[str, object], cache: object, batch: int) -> None:
    """Put the prompt's keys and values into the cache of the call, a new one if none was given, in `arguments`.

    Pairs that layers cannot hold are cut or skipped. Under gradient checkpointing layers get the cache when they run,
    now and in the backward pass. `stack.now.lent` notes a cache to leave out of the output: if the call, or else the
    config, wants none, or under checkpointing.

    Outside of causal and encoder-decoder models, a call without an attention mask gets one of ones, (batch, tokens).
    With sdpa, each None in a dict of masks becomes a causal mask of the input's tokens.
    """
    assert stack.now.keys is not None and stack.now.as_pairs is not None and stack.cache_name is not None
    replayed = stack.now.replays.prepare_checkpointing()
    value = stack.now.replays.detach_if_reentrant(stack.now.keys, arguments) if replayed else stack.now.keys
    pairs = kv_prefix.fit_pairs(stack.now.as_pairs(value), stack.shapes)
    arguments[stack.cache_name] = filled = stack.fill_cache(cache, pairs, batch)
    if replayed:
        stack.now.replays.start(kv_prefix.freeze_cache(filled))
    asked = arguments.get("use_cache")
    if replayed or not (getattr(stack.config, "use_cache", True) if asked is None else asked):
        stack.now.lent = filled
    first, mask = find_first_input(arguments), arguments.get("attention_mask")
    if not stack.causal and not stack.in_pair and mask is None:
        arguments["attention_mask"] = torch.ones(first.shape[:2], dtype=torch.long, device=first.device)
    elif isinstance(mask, dict) and getattr(stack.config, "_attn_implementation", None) == "sdpa":
        # None means torch's causal mask, which aligns the first query with the first key
        causal = torch.ones(first.shape[1], first.shape[1], dtype=torch.bool, device=first.device).tril()
        arguments["attention_mask"] = {kind: causal[None, None] if m is None else m for kind, m in mask.items()}


def extend_arguments(stack: PromptStack, arguments: dict[str, Any], total: int, before: int, batch: int) -> None:
    """Extend masks and positions in `arguments` to the prompt's tokens, in place.

    Masks may be one, or a dict by kind of layer. In a dict the kinds with "sliding" in their name get the config's
    window; a single mask gets it if all layers slide. Without a mask nothing is made. `position_ids` and
    `cache_position` are shifted by the number of the prompt's tokens; with `before` the prompt's positions go in front,
    counted from the lowest of the call's.

    before: the number of the prompt's tokens in front of this call's input.
    """
    mask, window = arguments.get("attention_mask"), getattr(stack.config, "sliding_window", None)
    cuts = kv_prefix.has_sliding_window(arguments.get(stack.cache_name or ""))
    if isinstance(mask, dict):
        windows = {kind: window if "sliding" in kind else None for kind in mask}
        arguments["attention_mask"] = {
            kind: extend_mask(stack, m, total, before, windows[kind], cuts) for kind, m in mask.items()
        }
    elif mask is not None:
        slides = all("sliding" in kind for kind in getattr(stack.config, "layer_types", None) or ())
        arguments["attention_mask"] = extend_mask(stack, mask, total, before, window if slides else None, cuts)
    for name in ("position_ids", "cache_position"):
        positions = arguments.get(name)
        if positions is not None:
            arguments[name] = positions + stack.now.tokens
            if before:
                front = torch.arange(before, device=positions.device, dtype=positions.dtype)
                front = front + positions.amin(-1, keepdim=True)  # some models count from 1
                arguments[name] = torch.cat([front, arguments[name]], dim=-1)


def extend_encoder_mask(stack: PromptStack, arguments: dict[str, Any]) -> None:
    """Put ones before the mask of the encoder's output, in place, if a prompt precedes that output and the mask lacks
    it.
    """
    mask, hidden = arguments.get("encoder_attention_mask"), arguments.get("encoder_hidden_states")
    if mask is not None and hidden is not None and mask.shape[-1] + stack.now.encoded == hidden.shape[1]:
        arguments["encoder_attention_mask"] = torch.cat(
            [mask.new_ones(*mask.shape[:-1], stack.now.encoded), mask], dim=-1
        )
