# SPDX-License-Identifier: Apache-2.0
"""Which prompts a stack of layers can take, and which calls of a model; asked before anything changes or runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from graft.core.errors import ConfigError, warn
from graft.prompts import kv_prefix
from graft.prompts.kv_prefix import length
from graft.prompts.stack import CACHES, OLD_CACHE, Stack

if TYPE_CHECKING:
    from graft.config.prompt import PromptLearningConfig


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
    why = None if stack.cuts else kv_prefix.unclear_heads(stack.module)
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


INPUTS = ("input_ids", "inputs", "inputs_embeds")


def check_caches(kwargs: dict[str, object], model: nn.Module) -> None:
    """Raise ValueError for caches that `generate` cannot use with a prompt."""
    settings = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    kind = kwargs.get("cache_implementation") or getattr(settings, "cache_implementation", None)
    if kind is not None and "static" in str(kind):
        raise ValueError(
            f"cache_implementation='{kind}' has no room for a prompt: leave it out, so that the cache can grow."
        )
    count = next((length(kwargs[name]) for name in CACHES if kwargs.get(name) is not None), 0)
    if count:  # generate would skip that many tokens of its input, the prompt's among them
        raise ValueError(
            f"generate() got a cache that holds {count} tokens, and would take the prompt's for tokens of the input. A "
            "cache that holds a prompt is continued by forward(); or leave the cache out, to begin anew."
        )


def check_assistant(kwargs: dict[str, object], model: nn.Module, stack: Stack) -> None:
    """Raise ValueError for assisted decoding that counts a cache's tokens from the front, not from the back."""
    settings = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    lookup = kwargs.get("prompt_lookup_num_tokens") or getattr(settings, "prompt_lookup_num_tokens", None)
    if stack.cache_name == OLD_CACHE and (lookup or kwargs.get("assistant_model") is not None):
        raise ValueError(
            "Assisted decoding cuts off the prompt's part of the cache under this version of transformers: leave "
            "assistant_model and prompt_lookup_num_tokens out, or use one whose cache argument is `cache`."
        )


def drop_encoder_outputs(kwargs: dict[str, object], cfg: PromptLearningConfig) -> None:
    """Drop `encoder_outputs`, which lack the prompt, with a warning; raise ValueError if there is no other input."""
    if kwargs.get("encoder_outputs") is not None:
        if kwargs.get("input_ids") is None and kwargs.get("inputs_embeds") is None:
            raise ValueError("encoder_outputs do not hold the prompt: pass input_ids instead.")
        del kwargs["encoder_outputs"]
        warn(
            "`encoder_outputs` should not be passed when using prompts in the encoder: they are computed again, with "
            f"the prompt of {cfg.num_virtual_tokens} tokens."
        )


def check_rows(value: Tensor, kwargs: dict[str, object]) -> None:
    """Raise ValueError unless there is one prompt for all samples, or one for each."""
    first = next((t for n in INPUTS if isinstance(t := kwargs.get(n), Tensor)), None)
    if value.dim() == 3 and first is not None and len(value) not in (1, len(first)):
        raise ValueError(f"task_ids has {len(value)} numbers, and the batch {len(first)} samples: pass one for each.")
