# SPDX-License-Identifier: Apache-2.0
"""The stack of layers of a base model, where a prompt enters: a hook rewrites the stack's arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from graft.core.errors import ConfigError
from graft.prompts import kv_prefix
from graft.prompts.inside import first_of, layers_in, positions_in, words_in
from graft.prompts.kv_prefix import is_static, length, per_row
from graft.prompts.masks import widened
from graft.prompts.replays import Replays

NEW_CACHE, OLD_CACHE = CACHES = ("cache", "past_key_values")  # the argument in transformers from 5.2x on, and before
# arguments with a number per token, and the number of the prompt's tokens
KINDS = {"token_type_ids": 0, "mm_token_type_ids": 0, "visual_pos_masks": 0, "global_attention_mask": 1}
ORDERS = ("perm_mask", "target_mapping")  # XLNet's arguments, which have no place for a prompt
TEXT_PARTS = ("language_model", "text_model", "decoder")  # inside models that read images as well, and OPT


def stacks_of(model: Any) -> dict[str, Stack]:
    """Return {"main": stack} of a model, or its encoder as "main" and its "decoder"."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return {"main": Stack(model.get_encoder(), model), "decoder": Stack(model.get_decoder(), model)}
    inner = outer = getattr(model, getattr(model, "base_model_prefix", "") or "", model)
    while (part := next((p for n in TEXT_PARTS if (p := getattr(inner, n, None)) is not None), None)) is not None:
        inner = part
    return {"main": Stack(inner if isinstance(inner, nn.Module) else model, model, outer)}


@dataclass
class Visit:
    """The prompt that enters a stack during one call of the model, and how far it got."""

    replays: Replays
    tokens: int = 0
    embeddings: Tensor | None = None
    keys: Tensor | None = None
    as_pairs: Callable[[Tensor], Any] | None = None
    encoded: int = 0  # tokens of a prompt at the front of the encoder's output
    covered: bool = False  # the attention mask has columns for the prompt already
    strips: bool = False  # the output comes back without the prompt's tokens
    visited: bool = False
    entered: bool = False
    widened_outside: bool = False
    lent: Any = None  # a cache for the prompt only, which the output leaves out


class Stack:
    """A module with the hook by which prompts enter. `put_…` sets the prompt of the call that `begin` began.

    Positions, masks and types that come with the input are those of its own tokens. The hook widens them for the
    prompt where it enters, and in each later step, whose cache then holds the prompt.

    Args:
        outer: the module that calls `module` in a model that reads images as well. It may make masks and positions
            from the cache, so in later steps it must already see the prompt.
    """

    def __init__(self, module: nn.Module, model: Any, outer: Any = None):
        self.module, self.model, self.outer = module, model, outer if isinstance(outer, nn.Module) else module
        self.names, self.outer_names = (list(inspect.signature(m.forward).parameters) for m in (module, self.outer))
        self.cache_name = next((n for n in CACHES if n in self.names), None)
        self.positions = positions_in(module)
        self.config = getattr(module, "config", None)
        self.layers = layers_in(module)
        self.shapes = kv_prefix.key_shapes(module)
        self.cuts = kv_prefix.head_cuts(module)
        self.causal = any(getattr(m, "is_causal", False) for m in module.modules())
        self.in_pair = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self._attached = False
        self.now = Visit(Replays(self))

    def attach(self) -> None:
        if not self._attached:
            self.module.register_forward_pre_hook(self.enter, with_kwargs=True)
            self.module.register_forward_hook(self.leave)
            if self.outer is not self.module:
                self.outer.register_forward_pre_hook(self.step, with_kwargs=True)
            self._attached = True

    def begin(self) -> Visit:
        """Begin a call, as yet without a prompt. Return the call around it, for `end`: calls nest where, say, a logits
        processor calls the model."""
        outer, self.now = self.now, Visit(Replays(self))
        return outer

    def end(self, outer: Visit) -> None:
        self.now.replays.clear()
        self.now = outer

    def put_embeddings(self, value: Tensor) -> None:
        """Put embeddings before the input. `value`: (1 or batch, tokens, dim)."""
        self.now.embeddings, self.now.tokens = value, value.shape[1]

    def put_keys(self, value: Tensor, as_pairs: Callable[[Tensor], Any]) -> None:
        """Put keys and values before each layer's own: those that `as_pairs` makes of `value` (tokens, …)."""
        self.now.keys, self.now.as_pairs, self.now.tokens = value, as_pairs, value.shape[-2]

    # facts

    @property
    def words(self) -> Any:
        """The word embeddings that the model has now: an adapter may have its own."""
        return words_in(self.module) or words_in(self.model)

    @property
    def width(self) -> int | None:
        """The width of the word embeddings. Layers may be wider, and project them."""
        words = self.words
        return None if words is None else words.weight.shape[1]

    @property
    def device(self) -> torch.device:
        found = chain((self.words or self.module).parameters(), self.module.parameters())
        return next(found).device  # FSDP may leave the word embeddings without parameters

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.module.parameters() if p.is_floating_point())

    def check_kind(self, cfg: Any) -> None:
        """Raise ConfigError if prompts of this kind cannot enter here, whatever their sizes."""
        name, kind = type(self.module).__name__, cfg.peft_type.value
        cached = list(getattr(kv_prefix.new_cache(self.config, False), "layers", ())) if self.cache_name else []
        states = [i for i, layer in enumerate(cached) if kv_prefix.holds_state(layer)]
        stateful = self.cache_name is None and "cache_params" in self.names
        if stateful or (states and not any(map(kv_prefix.holds_tokens, cached))):
            raise ConfigError(
                f"{name} keeps a state instead of a cache of tokens: {kind} cannot be used with it. Methods that act "
                "on layers, such as LORA, can."
            )
        if not cfg.holds_keys:
            return
        why = None if self.cuts else kv_prefix.unclear_heads(self.module)
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
        if getattr(self.config, "kv_lora_rank", None):
            raise ConfigError(
                f"{name} compresses the keys and values of its layers (multi-head latent attention): {kind} cannot be "
                "used with it. PROMPT_TUNING or P_TUNING can."
            )

    def check(self, cfg: Any) -> None:
        """Raise ConfigError if the prompt of a config cannot enter here."""
        name, kind = type(self.module).__name__, cfg.peft_type.value
        limit = self.positions or getattr(self.config, "max_position_embeddings", None)
        if isinstance(limit, int) and limit > 0 and cfg.num_virtual_tokens >= limit:
            raise ConfigError(
                f"num_virtual_tokens={cfg.num_virtual_tokens} leaves no room for input: {name} has {limit} positions, "
                f"{cfg.num_virtual_tokens - limit + 1} too few."
            )
        if cfg.holds_keys:
            if self.cache_name is None:
                raise ConfigError(
                    f"Model does not support past key values which are required for prefix tuning: {name} has no "
                    f"cache argument, so {kind} cannot be used with it. PROMPT_TUNING or P_TUNING can."
                )
            if cfg.num_layers < len(self.layers):
                raise ConfigError(f"num_layers={cfg.num_layers}, but {name} has {len(self.layers)}: pass them all.")
            return
        if "inputs_embeds" not in self.names or self.width is None:
            raise ConfigError(
                f"{name} takes no inputs_embeds, embeddings of words, which {kind} needs: its input is "
                f"{self.names[0] if self.names else 'nothing'}. Methods that act on layers, such as LORA, can be used."
            )
        if cfg.token_dim != self.width:
            raise ConfigError(f"token_dim={cfg.token_dim}, but {name} has embeddings of {self.width} numbers.")

    def check_visited(self) -> None:
        """Raise RuntimeError if the model never ran this module in the call: the prompt had no effect."""
        if self.now.tokens and not self.now.visited:
            raise RuntimeError(
                f"The base model never called its {type(self.module).__name__}, where the prompt enters: prompt "
                "methods cannot be used with a model that is built like this one."
            )

    # the hook

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if not self.now.tokens and not self.now.encoded:
            return None
        self.now.visited = True
        given = self._given(self.names, args, kwargs)
        if self.now.encoded:
            self._widen_encoded(given)
        if self.now.tokens:
            self._enter(given)
        return (), given

    def step(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Widen masks and positions before `outer` in later steps: the hook on it."""
        given = self._given(self.outer_names, args, kwargs)
        first, seen = first_of(given), length(given.get(self.cache_name or ""))
        self.now.widened_outside = bool(self.now.tokens and seen and first is not None)
        if not self.now.widened_outside:
            return None
        self._widen(given, first.shape[1] + seen, 0, len(first))
        return (), given

    def _given(self, names: list[str], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return a call's arguments by name; a cache under the new name even if it came under the old one."""
        given = {**dict(zip(names, args)), **kwargs}
        if self.cache_name == NEW_CACHE and given.get(NEW_CACHE) is None and given.get(OLD_CACHE) is not None:
            given[NEW_CACHE] = given.pop(OLD_CACHE)
        return given

    def leave(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if self.now.strips and self.now.entered:
            if isinstance(output, tuple):
                return output[0][:, self.now.tokens :], *output[1:]
            output.last_hidden_state = output.last_hidden_state[:, self.now.tokens :]
        lent, self.now.lent = self.now.lent, None
        if lent is None:
            return None
        if isinstance(output, tuple):
            return tuple(part for part in output if part is not lent)
        return type(output)(**{name: part for name, part in output.items() if part is not lent})

    def _enter(self, given: dict[str, Any]) -> None:
        first = first_of(given)
        if first is None:
            return  # the module's own error names the missing argument
        if given.get("input_ids") is not None and given.get("inputs_embeds") is not None:
            raise ValueError("Pass either input_ids or inputs_embeds: they are the same input.")
        if first.dim() < 2:
            raise ValueError(f"The input must be (batch, tokens), got {tuple(first.shape)}: pass input_ids[None].")
        order = next((name for name in ORDERS if given.get(name) is not None), None)
        if order is not None:
            raise ValueError(
                f"{order} has no place for the prompt's tokens: {type(self.module).__name__} cannot generate with a "
                "prompt, which forward() can be used with."
            )
        batch, new = first.shape[:2]
        cache = given.get(self.cache_name) if self.cache_name else None
        seen = length(cache)
        self.now.entered = not seen
        if not seen and is_static(cache):
            raise ValueError(
                f"A {type(cache).__name__} has no room for a prompt of {self.now.tokens} tokens: leave it out, or pass "
                "cache_implementation='dynamic' to generate()."
            )
        total = new + (seen or self.now.tokens)
        if self.positions is not None and total > self.positions:
            raise ValueError(
                f"{total - self.now.tokens} tokens and a prompt of {self.now.tokens} need {total} positions, and "
                f"{type(self.module).__name__} has {self.positions}: {total - self.positions} too many."
            )
        before = 0
        if self.now.entered and self.now.embeddings is not None:
            before = self.now.tokens
            self._put_embeddings(given, batch)
        elif self.now.entered:
            self._put_keys(given, cache, batch)
        if not self.now.widened_outside:
            self._widen(given, total, before, batch)
        self.now.widened_outside = False

    def _put_embeddings(self, given: dict[str, Any], batch: int) -> None:
        embeds = given.get("inputs_embeds")
        if getattr(self.config, "hidden_size_per_layer_input", None):
            self._put_per_layer(given, batch)
        if embeds is None:
            embeds = self.words(given["input_ids"])
        assert self.now.embeddings is not None
        prompt = per_row(self.now.embeddings, batch).to(device=embeds.device, dtype=embeds.dtype)
        given["inputs_embeds"], given["input_ids"] = torch.cat([prompt, embeds], dim=1), None
        for name, kind in KINDS.items():
            if given.get(name) is not None:
                given[name] = nn.functional.pad(given[name], (self.now.tokens, 0), value=kind)

    def _put_per_layer(self, given: dict[str, Any], batch: int) -> None:
        """Put padding's embeddings for the prompt into the per-layer embeddings of Gemma 3n and 4, as for images."""
        module: Any = self.module
        own = given.get("per_layer_inputs")
        if own is None and given.get("input_ids") is not None:
            own = module.get_per_layer_inputs(given["input_ids"])
        if own is not None:
            padding = torch.full(
                (batch, self.now.tokens), getattr(self.config, "pad_token_id", None) or 0, device=own.device
            )
            given["per_layer_inputs"] = torch.cat([module.get_per_layer_inputs(padding), own], dim=1)

    def _put_keys(self, given: dict[str, Any], cache: Any, batch: int) -> None:
        assert self.now.keys is not None and self.now.as_pairs is not None and self.cache_name is not None
        replayed = self.now.replays.wanted()
        value = self.now.replays.apart(self.now.keys, given) if replayed else self.now.keys
        pairs = kv_prefix.fitted(self.now.as_pairs(value), self.key_shapes())
        given[self.cache_name] = filled = self.filled(cache, pairs, batch)
        if replayed:
            self.now.replays.start(kv_prefix.frozen(filled))
        asked = given.get("use_cache")
        if replayed or not (getattr(self.config, "use_cache", True) if asked is None else asked):
            self.now.lent = filled
        first, mask = first_of(given), given.get("attention_mask")
        if not self.causal and not self.in_pair and mask is None:
            given["attention_mask"] = torch.ones(first.shape[:2], dtype=torch.long, device=first.device)
        elif isinstance(mask, dict) and getattr(self.config, "_attn_implementation", None) == "sdpa":
            # None would stand for torch's causal mask, in which queries and keys begin together
            causal = torch.ones(first.shape[1], first.shape[1], dtype=torch.bool, device=first.device).tril()
            given["attention_mask"] = {kind: causal[None, None] if m is None else m for kind, m in mask.items()}

    def key_shapes(self) -> Any:
        return self.shapes

    def filled(self, cache: Any, pairs: Any, batch: int) -> Any:
        if cache is None:
            cache = kv_prefix.new_cache(self.config, self.in_pair)
        pairs = pairs[: len(self.layers) or None]  # the config counts the encoder's layers, which may be more
        pairs = kv_prefix.own_heads(pairs, self.cuts)
        return kv_prefix.fill(cache, pairs, batch, self.dtype, self.devices(len(pairs)))

    def devices(self, layers: int) -> list[torch.device]:
        """Return the device of each layer."""
        parts = [self.layers.get(i, self.module) for i in range(layers)]
        where = [next((p.device for p in part.parameters()), self.device) for part in parts]
        return [self.device if d.type == "meta" else d for d in where]

    def _widen(self, given: dict[str, Any], total: int, before: int, batch: int) -> None:
        """Extend masks and positions to the prompt's tokens, of which the input of this call has `before`."""
        mask, window = given.get("attention_mask"), getattr(self.config, "sliding_window", None)
        cuts = kv_prefix.slides(given.get(self.cache_name or ""))
        if isinstance(mask, dict):
            windows = {kind: window if "sliding" in kind else None for kind in mask}
            given["attention_mask"] = {
                kind: self._widened(m, total, before, windows[kind], cuts) for kind, m in mask.items()
            }
        elif mask is not None:
            slides = all("sliding" in kind for kind in getattr(self.config, "layer_types", None) or ())
            given["attention_mask"] = self._widened(mask, total, before, window if slides else None, cuts)
        for name in ("position_ids", "cache_position"):
            positions = given.get(name)
            if positions is not None:
                given[name] = positions + self.now.tokens
                if before:
                    own = torch.arange(before, device=positions.device, dtype=positions.dtype)
                    own = own + positions.amin(-1, keepdim=True)  # some models count from 1
                    given[name] = torch.cat([own, given[name]], dim=-1)

    def _widened(self, mask: Any, total: int, before: int, window: int | None, cuts: bool) -> Any:
        now = self.now
        return widened(mask, now.tokens, total, before, window, cuts, self.causal, now.covered)

    def _widen_encoded(self, given: dict[str, Any]) -> None:
        mask, hidden = given.get("encoder_attention_mask"), given.get("encoder_hidden_states")
        if mask is not None and hidden is not None and mask.shape[-1] + self.now.encoded == hidden.shape[1]:
            given["encoder_attention_mask"] = torch.cat(
                [mask.new_ones(*mask.shape[:-1], self.now.encoded), mask], dim=-1
            )
