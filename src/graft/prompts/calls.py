# SPDX-License-Identifier: Apache-2.0
"""Which calls of a model can have a prompt in front of their input, asked before the model runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graft.core.errors import warn
from graft.prompts.kv_prefix import length
from graft.prompts.stack import CACHES, OLD_CACHE, Stack

INPUTS = ("input_ids", "inputs", "inputs_embeds")


def check_caches(kwargs: dict[str, Any], model: Any) -> None:
    """Raise ValueError for caches that `generate` cannot use with a prompt."""
    settings = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    kind = kwargs.get("cache_implementation") or getattr(settings, "cache_implementation", None)
    if kind is not None and "static" in str(kind):
        raise ValueError(
            f"cache_implementation='{kind}' has no room for a prompt: leave it out, so that the cache can grow."
        )
    held = next((length(kwargs[name]) for name in CACHES if kwargs.get(name) is not None), 0)
    if held:  # generate would skip that many tokens of its input, the prompt's among them
        raise ValueError(
            f"generate() got a cache that holds {held} tokens, and would take the prompt's for tokens of the input. A "
            "cache that holds a prompt is continued by forward(); or leave the cache out, to begin anew."
        )


def check_assistant(kwargs: dict[str, Any], model: Any, stack: Stack) -> None:
    """Raise ValueError for assisted decoding that counts a cache's tokens from the front, not from the back."""
    settings = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    lookup = kwargs.get("prompt_lookup_num_tokens") or getattr(settings, "prompt_lookup_num_tokens", None)
    if stack.cache_name == OLD_CACHE and (lookup or kwargs.get("assistant_model") is not None):
        raise ValueError(
            "Assisted decoding cuts off the prompt's part of the cache under this version of transformers: leave "
            "assistant_model and prompt_lookup_num_tokens out, or use one whose cache argument is `cache`."
        )


def drop_encoder_outputs(kwargs: dict[str, Any], cfg: Any) -> None:
    """Drop `encoder_outputs`, which lack the prompt, with a warning; raise ValueError if there is no other input."""
    if kwargs.get("encoder_outputs") is not None:
        if kwargs.get("input_ids") is None and kwargs.get("inputs_embeds") is None:
            raise ValueError("encoder_outputs do not hold the prompt: pass input_ids instead.")
        del kwargs["encoder_outputs"]
        warn(
            "`encoder_outputs` should not be passed when using prompts in the encoder: they are computed again, with "
            f"the prompt of {cfg.num_virtual_tokens} tokens."
        )


def check_rows(value: Tensor, kwargs: dict[str, Any]) -> None:
    """Raise ValueError unless there is one prompt for all samples, or one for each."""
    first = next((t for n in INPUTS if isinstance(t := kwargs.get(n), Tensor)), None)
    if value.dim() == 3 and first is not None and len(value) not in (1, len(first)):
        raise ValueError(f"task_ids has {len(value)} numbers, and the batch {len(first)} samples: pass one for each.")
