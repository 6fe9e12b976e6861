# SPDX-License-Identifier: Apache-2.0
"""Initial values for prompts of keys and values: those of a text, or of a cache that a model has filled."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from graft.core.errors import warn
from graft.io.save import registry_of
from graft.prompts.base import check_tokens
from graft.prompts.prefix_tuning import from_pairs

Pair = tuple[Tensor, Tensor]  # key and value of one layer, each (1, heads, tokens, head_dim)


def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> Tensor:
    """Return the first tokens of a cache as a prompt, (tokens, 2 · layers · heads · head_dim).

    Args:
        past_key_values: of one sequence: a cache of transformers, or an iterable with (key, value) for each layer,
            each (1, heads, tokens, head_dim).
        num_virtual_tokens: how many tokens to take.

    Raises:
        ValueError: the cache is empty, too short, not of one sequence, or its layers differ in shape.
        TypeError: it is no cache.
    """
    return from_pairs(checked(past_key_values, num_virtual_tokens), num_virtual_tokens)


def initialize_kv_prefix_from_past_key_values(
    model: Any, *, adapter_name: str | None = None, past_key_values: Any, num_virtual_tokens: int | None = None
) -> Tensor:
    """Set a CARTRIDGE or PREFIX_TUNING adapter to the first tokens of a cache.

    Args:
        adapter_name: the active one if None.
        past_key_values: as in `prompt_embeddings_from_past_key_values`, of the same base model.
        num_virtual_tokens: the adapter's own number, or None.

    Returns:
        The new prompt, (tokens, 2 · layers · heads · head_dim), in the cache's dtype.

    Raises:
        ValueError: as `prompt_embeddings_from_past_key_values`; or the adapter holds no keys and values, computes them
            by a projection, or has another shape. The adapter is then as it was.
        TypeError: it is no cache, or `model` is no PeftModel.
    """
    name, config, encoder = prefix_of(model, adapter_name, num_virtual_tokens)
    tokens = config.num_virtual_tokens
    pairs = checked(past_key_values, tokens)
    have = len(pairs), pairs[0][0].shape[1], pairs[0][0].shape[3]
    heads = config.num_attention_heads
    need = config.num_layers, heads, config.token_dim // heads
    if have != need:
        raise ValueError(
            "The cache has {} layers with {} heads of {}, but adapter '{}' needs {} with {} of {}: fill it with the "
            "adapter's own base model.".format(*have, name, *need)
        )
    values = from_pairs(pairs, tokens).detach()
    with registry_of(unwrapped(model)).call.gate.change(f"new keys and values of adapter '{name}'", (name,)):
        encoder.load_prompt_embeddings(values)
    return values


def initialize_kv_prefix_from_text(
    model: Any,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Set a CARTRIDGE or PREFIX_TUNING adapter to the keys and values of the first tokens of a text.

    The base model reads just these tokens, without adapters and without dropout: later ones do not change them.

    Args:
        tokenizer: the base model's.
        text: a text of at least as many tokens as the adapter has.
        adapter_name: the active one if None.
        num_virtual_tokens: the adapter's own number, or None.
        use_chat_template: let the tokenizer present the text as a system message, if it has a template for chats.
        max_length: take no more tokens of the text than these.

    Returns:
        The new prompt, (tokens, 2 · layers · heads · head_dim), in the base model's dtype.

    Raises:
        ValueError: the text is too short, the tokenizer another model's, or the adapter does not fit (as in
            `initialize_kv_prefix_from_past_key_values`). The adapter is then as it was.
    """
    from transformers import DynamicCache

    name, config, _ = prefix_of(model, adapter_name, num_virtual_tokens)
    stack = registry_of(unwrapped(model)).stacks["main"]
    if stack.in_pair:
        raise ValueError(f"Adapter '{name}' acts in a decoder beside an encoder, which cannot read a text on its own.")
    ids, P = token_ids(tokenizer, text, use_chat_template, max_length), config.num_virtual_tokens
    if ids.shape[1] < P:
        raise ValueError(
            f"Need at least {P} cached tokens, got {ids.shape[1]}: adapter '{name}' has as many virtual tokens. Pass a "
            "longer text or max_length, or make the prompt shorter."
        )
    if stack.words is not None:
        check_tokens(ids, stack.words, "The text")
    cache = DynamicCache()  # without the model's config it also keeps tokens outside a sliding window
    training = [m for m in stack.module.modules() if m.training]
    try:
        with torch.no_grad(), model.disable_adapter():
            stack.module.eval()
            stack.module(input_ids=ids[:, :P].to(stack.device), use_cache=True, **{stack.cache_name: cache})
    finally:
        for m in training:
            m.training = True
    return initialize_kv_prefix_from_past_key_values(model, adapter_name=name, past_key_values=cache)


def unwrapped(model: Any) -> Any:
    """Return a model without torch.compile's wrapper."""
    return getattr(model, "_orig_mod", model)


def prefix_of(model: Any, adapter_name: str | None, num_virtual_tokens: int | None) -> tuple[str, Any, Any]:
    """Return name, config and encoder of an adapter whose keys and values a caller can set; raise for any other."""
    registry = registry_of(unwrapped(model))
    if registry is None:
        raise TypeError(
            f"model must be a PeftModel with a CARTRIDGE or PREFIX_TUNING adapter, got {type(model).__name__}."
        )
    if adapter_name is None:
        if not registry.active_adapters:
            raise ValueError(f"No adapter is active: pass adapter_name, one of {', '.join(registry.peft_config)}.")
        adapter_name = registry.active_adapters[0]
    registry.check_known([adapter_name])
    config = registry.peft_config[adapter_name]
    if not getattr(config, "holds_keys", False):
        raise ValueError(
            f"Adapter '{adapter_name}' must be a CARTRIDGE or PREFIX_TUNING adapter (got {config.peft_type.value}): "
            "others hold no keys and values."
        )
    encoder = registry.prompt_encoder[adapter_name]
    if getattr(encoder, "prefix_projection", False):
        raise ValueError(
            "Initialization from KV cache is not supported for prefix tuning with `prefix_projection=True`: keys and "
            f"values of adapter '{adapter_name}' are computed by a network. Make it with prefix_projection=False."
        )
    if config.num_transformer_submodules > 1:
        raise ValueError(
            f"Adapter '{adapter_name}' has num_transformer_submodules={config.num_transformer_submodules}: its layers "
            "share keys and values, which cannot be set to a cache's. Make it with num_transformer_submodules=1."
        )
    if num_virtual_tokens not in (None, config.num_virtual_tokens):
        raise ValueError(
            f"num_virtual_tokens={num_virtual_tokens}, but adapter '{adapter_name}' has {config.num_virtual_tokens}: "
            "leave it out."
        )
    return adapter_name, config, encoder


def token_ids(tokenizer: Any, text: str, use_chat_template: bool, max_length: int | None) -> Tensor:
    """Return the tokens of a text, (1, tokens), as a system message if the tokenizer has a template for chats."""
    ids = None
    template = getattr(tokenizer, "chat_template", "unknown") if hasattr(tokenizer, "apply_chat_template") else None
    if use_chat_template and template is not None:
        try:
            ids = tokenizer.apply_chat_template(
                [{"role": "system", "content": text}],
                tokenize=True, add_generation_prompt=False, return_tensors="pt", return_dict=False,
            )  # fmt: skip
        except Exception as e:  # templates raise errors of many types
            warn(
                f"The tokenizer's chat template does not take a system message ({e}): the text goes in without it. "
                "Pass use_chat_template=False if that is what you want."
            )
    if ids is None:
        cut = dict(truncation=max_length is not None, max_length=max_length)
        ids = tokenizer(text, return_tensors="pt", **cut)["input_ids"]
    return torch.as_tensor(ids).reshape(1, -1)[:, :max_length].long()


def checked(cache: Any, tokens: int) -> list[Pair]:
    """Return key and value of each layer of a cache; raise for all that can be wrong with it."""
    if tokens is None or tokens <= 0:
        raise ValueError(f"`num_virtual_tokens` must be positive, got {tokens}.")
    pairs = pairs_in(cache)
    if not pairs:
        raise ValueError("Empty `past_key_values`.")
    both = [t for pair in pairs for t in pair]
    odd = next((t for t in both if t.ndim != 4), None)
    if odd is not None:
        raise ValueError(
            "Expected key/value tensors with rank 4, (1, heads, tokens, head_dim), got one with shape "
            f"{tuple(odd.shape)}."
        )
    shapes = [(t.shape[0], t.shape[1], t.shape[3]) for t in both]
    batch = max(shape[0] for shape in shapes)
    if batch != 1:
        raise ValueError(
            f"`past_key_values` must come from a single sequence (batch=1). Got batch={batch}: pass one sample's rows."
        )
    if len(set(shapes)) > 1:
        raise ValueError(
            "Inconsistent head shapes across layers in `past_key_values`: a prompt has keys and values of one shape, "
            f"here are (heads, head_dim) {', '.join(map(str, sorted({s[1:] for s in shapes})))}."
        )
    shortest = min(t.shape[2] for t in both)
    if shortest < tokens:
        raise ValueError(f"Need at least {tokens} cached tokens, got {shortest}.")
    return pairs


def pairs_in(cache: Any) -> list[Pair]:
    """Return key and value of each layer, from a cache or from an iterable of pairs."""
    cache = getattr(cache, "self_attention_cache", cache)
    if hasattr(cache, "layers"):
        return [held(i, layer) for i, layer in enumerate(cache.layers)]
    if hasattr(cache, "to_legacy_cache"):
        cache = cache.to_legacy_cache()
    if isinstance(cache, Iterable) and not isinstance(cache, (Tensor, str)):
        layers = [tuple(layer[:2]) if isinstance(layer, (tuple, list)) else () for layer in cache]
        if all(len(layer) == 2 and all(isinstance(t, Tensor) for t in layer) for layer in layers):
            return layers  # type: ignore[return-value]
    raise TypeError(
        f"Unsupported `past_key_values` type {type(cache).__name__}: expected a cache of transformers, or an iterable "
        "with a pair of tensors (key, value) for each layer."
    )


def held(index: int, layer: Any) -> Pair:
    """Return keys and values that one layer of a cache holds, in the order in which they came."""
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    seen = int(layer.get_seq_length()) if keys is not None else 0
    if keys is None or values is None or not seen:
        raise ValueError(f"Empty `past_key_values`: layer {index} holds no keys and values.")
    if seen > keys.shape[-2]:
        raise ValueError(
            f"Layer {index} of the cache has seen {seen} tokens and keeps {keys.shape[-2]}: the first ones, which the "
            "prompt is made of, are gone. Fill it with fewer tokens, or use a DynamicCache() without a config."
        )
    return keys[..., :seen, :], values[..., :seen, :]  # a static cache has room that is not filled
