# SPDX-License-Identifier: Apache-2.0
"""The entry of a prompt into a stack: the check of prompts and calls before anything changes; and the hooks that put
the prompt into the arguments, and cut it from the output."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from graft.config.prompt import PromptLearningConfig
from graft.core.errors import ConfigError, warn
from graft.prompts import kv_prefix
from graft.prompts.arguments import extend_arguments, extend_encoder_mask, put_embeddings, put_keys
from graft.prompts.kv_prefix import count_tokens, is_static
from graft.prompts.stack import CACHES, NEW_CACHE, OLD_CACHE, PromptStack, find_first_input

Args = tuple[object, ...]  # of a call
Keywords = dict[str, object]
ORDERS = ("perm_mask", "target_mapping")  # arguments of XLNet, which cannot cover a prompt


def attach(stack: PromptStack) -> None:
    """Put the hooks on the stack's modules: `enter` before and `leave` after its module, `step` before an outer one.

    Only the first call does, and sets `attached`; the hooks stay.
    """
    if stack.attached:
        return
    stack.module.register_forward_pre_hook(partial(enter, stack), with_kwargs=True)
    stack.module.register_forward_hook(partial(leave, stack))
    if stack.outer is not stack.module:
        stack.outer.register_forward_pre_hook(partial(step, stack), with_kwargs=True)
    stack.attached = True


def enter(stack: PromptStack, module: nn.Module, args: Args, kwargs: Keywords) -> tuple[Args, Keywords] | None:
    """Return no positional arguments and all arguments by name, with the prompt put in: the hook before `module`.

    Return None, which changes nothing, if the present visit has no prompt here and none in the encoder's output. Marks
    the visit as visited. The mask of an encoder's output with a prompt is widened first.

    Raises ValueError for a call that a prompt cannot enter.
    """
    if not stack.now.tokens and not stack.now.encoded:
        return None
    stack.now.visited = True
    arguments = _by_name(stack, stack.names, args, kwargs)
    if stack.now.encoded:
        extend_encoder_mask(stack, arguments)
    if stack.now.tokens:
        _enter(stack, arguments)
    return (), arguments


def step(stack: PromptStack, module: nn.Module, args: Args, kwargs: Keywords) -> tuple[Args, Keywords] | None:
    """Return the arguments of `outer`, all by name, with masks and positions widened for the prompt in later steps: the
    hook on it.

    Later steps are calls with a prompt, an input, and a cache that holds tokens. Other calls return None, which changes
    nothing. `stack.now.widened_outside` notes which of both it was.
    """
    arguments = _by_name(stack, stack.outer_names, args, kwargs)
    first, seen = find_first_input(arguments), count_tokens(arguments.get(stack.cache_name or ""))
    stack.now.widened_outside = bool(stack.now.tokens and seen and first is not None)
    if not stack.now.widened_outside:
        return None
    extend_arguments(stack, arguments, first.shape[1] + seen, 0, len(first))
    return (), arguments


def _by_name(stack: PromptStack, names: list[str], args: Args, kwargs: Keywords) -> Keywords:
    """Return a call's arguments by name; keywords override positional ones.

    In a stack with the new cache argument, a cache under the old name is moved to the new one. That happens only if the
    old one is not None and the new one is missing or None.
    """
    arguments = {**dict(zip(names, args)), **kwargs}
    if stack.cache_name == NEW_CACHE and arguments.get(NEW_CACHE) is None and arguments.get(OLD_CACHE) is not None:
        arguments[NEW_CACHE] = arguments.pop(OLD_CACHE)
    return arguments


def leave(stack: PromptStack, module: nn.Module, args: tuple[object, ...], output: Any) -> object:
    """Return the output without the prompt: the hook after `module`.

    If the visit strips and the prompt entered, its tokens are cut from the hidden states; a tuple is returned at once,
    any other output is changed in place. A cache that was lent to the call is left out of a new output, and no longer
    noted in the visit. None, which changes nothing for the caller, if none was lent.
    """
    if stack.now.strips and stack.now.entered:
        if isinstance(output, tuple):
            return output[0][:, stack.now.tokens :], *output[1:]
        output.last_hidden_state = output.last_hidden_state[:, stack.now.tokens :]
    lent, stack.now.lent = stack.now.lent, None
    if lent is None:
        return None
    if isinstance(output, tuple):
        return tuple(part for part in output if part is not lent)
    return type(output)(**{name: part for name, part in output.items() if part is not lent})


def _enter(stack: PromptStack, arguments: dict[str, object]) -> None:
    """Put the prompt of the present visit into `arguments`, in place.

    If the cache holds no tokens, the prompt enters: its embeddings go before the input, or its keys and values into the
    cache. `stack.now.entered` notes whether it entered. Masks and positions are extended in every step, unless
    `stack.now.widened_outside` says that `step` did; the flag is then reset. Without an input nothing happens: the
    module's error names the missing argument.

    Raises:
        ValueError: both input_ids and inputs_embeds; an input without batch; XLNet's `perm_mask` or `target_mapping`;
            an empty static cache; or more tokens, with the prompt, than positions.
    """
    first = find_first_input(arguments)
    if first is None:
        return  # the module's own error names the missing argument
    if arguments.get("input_ids") is not None and arguments.get("inputs_embeds") is not None:
        raise ValueError("Pass either input_ids or inputs_embeds: they are the same input.")
    if first.dim() < 2:
        raise ValueError(f"The input must be (batch, tokens), got {tuple(first.shape)}. Pass input_ids[None].")
    order = next((name for name in ORDERS if arguments.get(name) is not None), None)
    if order is not None:
        raise ValueError(
            f"{order} has no place for the prompt's tokens, so that {type(stack.module).__name__} cannot generate with "
            "a prompt. Call forward() instead."
        )
    batch, new = first.shape[:2]
    cache = arguments.get(stack.cache_name) if stack.cache_name else None
    seen = count_tokens(cache)
    stack.now.entered = not seen
    if not seen and is_static(cache):
        raise ValueError(
            f"A {type(cache).__name__} has no room for a prompt of {stack.now.tokens} tokens. Leave it out, or pass "
            "cache_implementation='dynamic' to generate()."
        )
    total = new + (seen or stack.now.tokens)
    if stack.positions is not None and total > stack.positions:
        raise ValueError(
            f"{total - stack.now.tokens} tokens and a prompt of {stack.now.tokens} need {total} positions, and "
            f"{type(stack.module).__name__} has {stack.positions}: {total - stack.positions} too many. Pass fewer."
        )
    before = 0
    if stack.now.entered and stack.now.embeddings is not None:
        before = stack.now.tokens
        put_embeddings(stack, arguments, batch)
    elif stack.now.entered:
        put_keys(stack, arguments, cache, batch)
    if not stack.now.widened_outside:
        extend_arguments(stack, arguments, total, before, batch)
    stack.now.widened_outside = False


def check_kind(stack: PromptStack, cfg: Any) -> None:
    """Raise ConfigError if prompts of this kind cannot enter the stack, whatever their sizes.

    No prompt can enter a model that keeps only states: it takes `cache_params` and no cache, or its cache has states
    and no tokens. A kind with keys and values has three further reasons: heads are cut over processes by another layer
    than k_proj (`unclear_heads`); some layers keep a state; or keys and values are compressed (`kv_lora_rank`).
    """
    name, kind = type(stack.module).__name__, cfg.peft_type.value
    cached = list(getattr(kv_prefix.new_cache(stack.config, False), "layers", ())) if stack.cache_name else []
    tokens = list(map(kv_prefix.holds_tokens, cached))
    # layers of linear attention and of convolutions
    states = [i for i, layer in enumerate(cached) if hasattr(layer, "conv_states") and not tokens[i]]
    stateful = stack.cache_name is None and "cache_params" in stack.names
    if stateful or (states and not any(tokens)):
        raise ConfigError(
            f"{name} keeps a state instead of a cache of tokens, so that {kind} cannot be used with it. Use a method "
            "that acts on layers, such as LORA."
        )
    if not cfg.holds_keys:
        return
    why = None if stack.cuts else kv_prefix.unclear_heads(stack.module)
    if why is not None:
        raise ConfigError(
            f"{kind} cannot know which heads of {name} this process has: its attention has {why}, and no k_proj "
            "that is cut by heads. Load the model without tp_plan, or use PROMPT_TUNING or P_TUNING."
        )
    if states:
        raise ConfigError(
            f"Layers {states} of {name} keep a state instead of keys and values, so that {kind} cannot be used with "
            "it. Use PROMPT_TUNING or P_TUNING."
        )
    if getattr(stack.config, "kv_lora_rank", None):
        raise ConfigError(
            f"{name} compresses keys and values (multi-head latent attention), so that {kind} cannot be used with it. "
            "Use PROMPT_TUNING or P_TUNING."
        )


def check_size(stack: PromptStack, cfg: Any) -> None:
    """Raise ConfigError if the prompt of a config cannot enter the stack.

    A prompt must have fewer tokens than the stack has positions, by its table or else its config's
    `max_position_embeddings`; without either any number passes. Keys and values need a cache argument, and a num_layers
    of at least the stack's layers. Embeddings need an argument `inputs_embeds`, and a token_dim equal to the width of
    the word embeddings.
    """
    name, kind = type(stack.module).__name__, cfg.peft_type.value
    limit = stack.positions or getattr(stack.config, "max_position_embeddings", None)
    if isinstance(limit, int) and limit > 0 and cfg.num_virtual_tokens >= limit:
        raise ConfigError(
            f"num_virtual_tokens={cfg.num_virtual_tokens} leaves no room for input: {name} has {limit} positions, "
            f"{cfg.num_virtual_tokens - limit + 1} too few. Use fewer virtual tokens."
        )
    if cfg.holds_keys:
        if stack.cache_name is None:
            raise ConfigError(
                f"Model does not support past key values which are required for prefix tuning: {name} has no "
                f"cache argument, so {kind} cannot be used with it. Use PROMPT_TUNING or P_TUNING."
            )
        if cfg.num_layers < len(stack.layers):
            raise ConfigError(f"num_layers={cfg.num_layers}, but {name} has {len(stack.layers)} layers. Pass them all.")
        return
    if "inputs_embeds" not in stack.names or stack.width is None:
        raise ConfigError(
            f"{name} takes no inputs_embeds, embeddings of words, which {kind} needs: its input is "
            f"{stack.names[0] if stack.names else 'nothing'}. Use a method that acts on layers, such as LORA."
        )
    if cfg.token_dim != stack.width:
        raise ConfigError(f"token_dim={cfg.token_dim}, but {name} has embeddings of {stack.width}. Set that width.")


INPUTS = ("input_ids", "inputs", "inputs_embeds")


def check_generation(kwargs: dict[str, object], model: nn.Module, stack: PromptStack) -> None:
    """Raise ValueError for options of `generate` that have no place for a prompt in the stack. The first fault counts:

    - A static cache: `cache_implementation` in `kwargs`, or in the generation config of the call or else of the model,
      has "static" in it.
    - A cache that holds tokens, in `kwargs` under the new or the old argument's name. An empty cache passes.
    - Assisted decoding, by an assistant model or prompt lookup, in a stack with the old cache argument (`OLD_CACHE`).
      That counts a cache's tokens from the front, and would cut the prompt.
    """
    settings = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    kind = kwargs.get("cache_implementation") or getattr(settings, "cache_implementation", None)
    lookup = kwargs.get("prompt_lookup_num_tokens") or getattr(settings, "prompt_lookup_num_tokens", None)
    if kind is not None and "static" in str(kind):
        raise ValueError(
            f"cache_implementation='{kind}' has no room for a prompt. Leave it out, so that the cache can grow."
        )
    count = next((count_tokens(kwargs[name]) for name in CACHES if kwargs.get(name) is not None), 0)
    if count:  # generate would skip that many tokens of its input, the prompt's among them
        raise ValueError(
            f"generate() got a cache that holds {count} tokens, and would take the prompt's for tokens of the input. "
            "Continue the cache with forward(), or leave it out to begin anew."
        )
    if stack.cache_name == OLD_CACHE and (lookup or kwargs.get("assistant_model") is not None):
        raise ValueError(
            "Assisted decoding cuts off the prompt's part of the cache under this version of transformers. Leave "
            "assistant_model and prompt_lookup_num_tokens out, or use a version with a cache argument `cache`."
        )


def drop_encoder_outputs(kwargs: dict[str, object], cfg: PromptLearningConfig) -> None:
    """Delete `encoder_outputs`, which lack the prompt, from `kwargs`, with a warning; without them do nothing.

    Raises ValueError if the call has neither input_ids nor inputs_embeds; then nothing is deleted.
    """
    if kwargs.get("encoder_outputs") is not None:
        if kwargs.get("input_ids") is None and kwargs.get("inputs_embeds") is None:
            raise ValueError("encoder_outputs do not hold the prompt. Pass input_ids instead.")
        del kwargs["encoder_outputs"]
        warn(
            "`encoder_outputs` should not be passed when using prompts in the encoder: they are computed again, with "
            f"the prompt of {cfg.num_virtual_tokens} tokens."
        )


def check_rows(value: Tensor, kwargs: dict[str, object]) -> None:
    """Raise ValueError if a prompt (rows, tokens, dim) has another number of rows than 1 and the input's samples: of
    the first tensor among `input_ids`, `inputs` and `inputs_embeds`.

    Prompts of two dimensions and calls without an input tensor pass.
    """
    first = next((t for n in INPUTS if isinstance(t := kwargs.get(n), Tensor)), None)
    if value.dim() == 3 and first is not None and len(value) not in (1, len(first)):
        raise ValueError(f"task_ids has {len(value)} numbers, and the batch {len(first)} samples. Pass one for each.")
