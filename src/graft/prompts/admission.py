# SPDX-License-Identifier: Apache-2.0
"""Which prompts a stack of layers can take, asked before anything of the model has changed."""

from __future__ import annotations

from typing import Any

from graft.core.errors import ConfigError
from graft.prompts import heads, kv_prefix
from graft.prompts.stack import Stack


def check_kind(stack: Stack, cfg: Any) -> None:
    """Raise ConfigError if prompts of this kind cannot enter here, whatever their sizes."""
    name, kind = type(stack.module).__name__, cfg.peft_type.value
    cached = list(getattr(kv_prefix.new_cache(stack.config, False), "layers", ())) if stack.cache_name else []
    states = [i for i, layer in enumerate(cached) if kv_prefix.holds_state(layer)]
    stateful = stack.cache_name is None and "cache_params" in stack.names
    if stateful or (states and not any(map(kv_prefix.holds_tokens, cached))):
        raise ConfigError(
            f"{name} keeps a state instead of a cache of tokens: {kind} cannot be used with it. Methods that act "
            "on layers, such as LORA, can."
        )
    if not cfg.holds_keys:
        return
    why = None if stack.cuts else heads.unclear_heads(stack.module)
    if why is not None:
        raise ConfigError(
            f"{kind} cannot know which heads of {name} this process has: its attention has {why}, and no k_proj "
            "that is cut by heads. Load the model without tp_plan; or use PROMPT_TUNING or P_TUNING."
        )
    if states:
        raise ConfigError(
            f"Layers {states} of {name} keep a state instead of keys and values: {kind} cannot be used with it. "
            "PROMPT_TUNING or P_TUNING can."
        )
    if getattr(stack.config, "kv_lora_rank", None):
        raise ConfigError(
            f"{name} compresses the keys and values of its layers (multi-head latent attention): {kind} cannot be "
            "used with it. PROMPT_TUNING or P_TUNING can."
        )


def check_size(stack: Stack, cfg: Any) -> None:
    """Raise ConfigError if the prompt of a config cannot enter here."""
    name, kind = type(stack.module).__name__, cfg.peft_type.value
    limit = stack.positions or getattr(stack.config, "max_position_embeddings", None)
    if isinstance(limit, int) and limit > 0 and cfg.num_virtual_tokens >= limit:
        raise ConfigError(
            f"num_virtual_tokens={cfg.num_virtual_tokens} leaves no room for input: {name} has {limit} positions, "
            f"{cfg.num_virtual_tokens - limit + 1} too few."
        )
    if cfg.holds_keys:
        if stack.cache_name is None:
            raise ConfigError(
                f"Model does not support past key values which are required for prefix tuning: {name} has no "
                f"cache argument, so {kind} cannot be used with it. PROMPT_TUNING or P_TUNING can."
            )
        if cfg.num_layers < len(stack.layers):
            raise ConfigError(f"num_layers={cfg.num_layers}, but {name} has {len(stack.layers)}: pass them all.")
        return
    if "inputs_embeds" not in stack.names or stack.width is None:
        raise ConfigError(
            f"{name} takes no inputs_embeds, embeddings of words, which {kind} needs: its input is "
            f"{stack.names[0] if stack.names else 'nothing'}. Methods that act on layers, such as LORA, can be used."
        )
    if cfg.token_dim != stack.width:
        raise ConfigError(f"token_dim={cfg.token_dim}, but {name} has embeddings of {stack.width} numbers.")
