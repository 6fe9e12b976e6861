# SPDX-License-Identifier: Apache-2.0
"""Where a prompt enters a base model: the stack of layers, whose arguments a hook rewrites."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from graft.core.errors import ConfigError
from graft.model import kv_prefix
from graft.model.checkpointing import Replays
from graft.model.kv_prefix import length, per_row

CACHES = ("cache", "past_key_values")  # names of the argument, in transformers from 5.2x on and before
KINDS = ("token_type_ids", "mm_token_type_ids")  # 0 for the prompt's tokens
TEXT_PARTS = ("language_model", "text_model")  # of models that read images as well


def stacks_of(model: Any) -> dict[str, Stack]:
    """{"main": stack} of a model, or its encoder as "main" and its "decoder"."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return {"main": Stack(model.get_encoder(), model), "decoder": Stack(model.get_decoder(), model)}
    inner = getattr(model, getattr(model, "base_model_prefix", "") or "", model)
    while (part := next((p for n in TEXT_PARTS if (p := getattr(inner, n, None)) is not None), None)) is not None:
        inner = part
    return {"main": Stack(inner if isinstance(inner, nn.Module) else model, model)}


class Stack:
    """A hook on one module. `put_…` says what enters during the next calls; `clear` ends that.

    Positions, masks and types that come with the input are those of its own tokens. They are widened for the prompt
    where it enters, and in each later step, whose cache then holds the prompt.
    """

    def __init__(self, module: nn.Module, model: Any):
        self.module = module
        self.names = list(inspect.signature(module.forward).parameters)
        self.cache_name = next((n for n in CACHES if n in self.names), None)
        self.words: Any = words_in(module) or words_in(model)
        self.positions = positions_in(module)
        self.config = getattr(module, "config", None)
        self.causal = any(getattr(m, "is_causal", False) for m in module.modules())
        self.in_pair = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self.replays = Replays(self)
        self._attached = False
        self.clear()

    def attach(self) -> None:
        if not self._attached:
            self.module.register_forward_pre_hook(self.enter, with_kwargs=True)
            self.module.register_forward_hook(self.leave)
            self._attached = True

    def clear(self) -> None:
        self.tokens = 0
        self.embeddings: Tensor | None = None
        self.keys: Tensor | None = None
        self.as_pairs: Callable[[Tensor], Any] | None = None
        self.encoded = 0  # tokens of a prompt that the encoder's output has in front
        self.strips = False  # the prompt's tokens are taken out of the output again
        self._entered = False
        self.replays.clear()

    def put_embeddings(self, value: Tensor) -> None:
        """`value`: (1 or batch, tokens, dim)."""
        self.embeddings, self.tokens = value, value.shape[1]

    def put_keys(self, value: Tensor, as_pairs: Callable[[Tensor], Any]) -> None:
        """`value`: (tokens, …), from which `as_pairs` makes key and value of each layer."""
        self.keys, self.as_pairs, self.tokens = value, as_pairs, value.shape[-2]

    # facts

    @property
    def device(self) -> torch.device:
        owner = self.words if self.words is not None else self.module
        return next(owner.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.module.parameters() if p.is_floating_point())

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
            return
        if "inputs_embeds" not in self.names or self.words is None:
            raise ConfigError(f"{name} takes no inputs_embeds, which {kind} needs: it is no model of transformers.")
        if self.cache_name is None and "cache_params" in self.names:
            raise ConfigError(f"{name} keeps a state instead of a cache of tokens: {kind} cannot be used with it.")
        width = self.words.weight.shape[1]
        if cfg.token_dim != width:
            raise ConfigError(f"token_dim={cfg.token_dim}, but {name} has embeddings of {width} numbers.")

    # the hook

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if not self.tokens and not self.encoded:
            return None
        given = {**dict(zip(self.names, args)), **kwargs}
        if self.encoded:
            self._widen_encoded(given)
        if self.tokens:
            self._enter(given)
        return (), given

    def leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.strips and self._entered:
            output.last_hidden_state = output.last_hidden_state[:, self.tokens :]

    def _enter(self, given: dict[str, Any]) -> None:
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        first = embeds if embeds is not None else ids
        if first is None:
            return  # the module will say what is missing
        batch, new = first.shape[:2]
        cache = given.get(self.cache_name) if self.cache_name else None
        seen = length(cache)
        self._entered = not seen
        total = new + (seen or self.tokens)
        if self.positions is not None and total > self.positions:
            raise ValueError(
                f"{total - self.tokens} tokens and a prompt of {self.tokens} need {total} positions, and "
                f"{type(self.module).__name__} has {self.positions}: {total - self.positions} too many."
            )
        before = 0
        if self._entered and self.embeddings is not None:
            before = self.tokens
            self._put_embeddings(given, batch)
        elif self._entered:
            self._put_keys(given, cache, batch)
        self._widen(given, total, before, batch)

    def _put_embeddings(self, given: dict[str, Any], batch: int) -> None:
        embeds = given.get("inputs_embeds")
        if embeds is None:
            embeds = self.words(given["input_ids"])
        assert self.embeddings is not None
        prompt = per_row(self.embeddings, batch).to(device=embeds.device, dtype=embeds.dtype)
        given["inputs_embeds"], given["input_ids"] = torch.cat([prompt, embeds], dim=1), None
        for name in KINDS:
            if given.get(name) is not None:
                given[name] = nn.functional.pad(given[name], (self.tokens, 0))

    def _put_keys(self, given: dict[str, Any], cache: Any, batch: int) -> None:
        assert self.keys is not None and self.as_pairs is not None and self.cache_name is not None
        replayed = self.replays.wanted()
        value = self.replays.apart(self.keys, given) if replayed else self.keys
        pairs = kv_prefix.fitted(self.as_pairs(value), self.key_shapes())
        given[self.cache_name] = self.filled(cache, pairs, batch)
        if replayed:
            self.replays.start(kv_prefix.frozen(given[self.cache_name]))
        if not self.causal and not self.in_pair and given.get("attention_mask") is None:
            first = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
            given["attention_mask"] = torch.ones(first.shape[:2], dtype=torch.long, device=first.device)

    def key_shapes(self) -> Any:
        return kv_prefix.key_shapes(self.module)

    def filled(self, cache: Any, pairs: Any, batch: int) -> Any:
        if cache is None:
            cache = kv_prefix.new_cache(self.config, self.in_pair)
        return kv_prefix.fill(cache, pairs, batch, self.dtype, self.devices(len(pairs)))

    def devices(self, layers: int) -> list[torch.device]:
        """Where each layer is."""
        found = {i: m for m in self.module.modules() if isinstance(i := getattr(m, "layer_idx", None), int)}
        where = [next((p.device for p in found[i].parameters()), None) if i in found else None for i in range(layers)]
        return [d if d is not None and d.type != "meta" else self.device for d in where]

    def _widen(self, given: dict[str, Any], total: int, before: int, batch: int) -> None:
        """Let what counts tokens count the prompt's. `before`: tokens of it that are in this call's input."""
        mask = given.get("attention_mask")
        if isinstance(mask, dict):
            given["attention_mask"] = {k: self._widened(m, total, before) for k, m in mask.items()}
        elif mask is not None:
            given["attention_mask"] = self._widened(mask, total, before)
        for name in ("position_ids", "cache_position"):
            positions = given.get(name)
            if positions is not None:
                own = torch.arange(before, device=positions.device, dtype=positions.dtype)
                shifted = positions + self.tokens
                given[name] = torch.cat([own.expand(*positions.shape[:-1], before), shifted], dim=-1)

    def _widened(self, mask: Any, total: int, before: int) -> Any:
        if not isinstance(mask, Tensor) or mask.shape[-1] != total - self.tokens:
            return mask
        if mask.dim() == 2:
            return torch.cat([mask.new_ones(len(mask), self.tokens), mask], dim=1)
        open_, shut = (0, torch.finfo(mask.dtype).min) if mask.is_floating_point() else (1, 0)
        b, h, q, k = mask.shape
        mask = torch.cat([mask.new_full((b, h, q, self.tokens), open_), mask], dim=-1)
        if not before:
            return mask
        if self.causal:
            own = torch.full((before, before), shut, dtype=mask.dtype, device=mask.device).triu(1)
            own = own if mask.is_floating_point() else torch.ones_like(own).tril()
            rows = torch.cat([own, own.new_full((before, k), shut)], dim=1).expand(b, h, before, -1)
        else:
            rows = mask.amax(-2, keepdim=True).expand(b, h, before, -1)  # what any token may see
        return torch.cat([rows, mask], dim=-2)

    def _widen_encoded(self, given: dict[str, Any]) -> None:
        mask, hidden = given.get("encoder_attention_mask"), given.get("encoder_hidden_states")
        if mask is not None and hidden is not None and mask.shape[-1] + self.encoded == hidden.shape[1]:
            given["encoder_attention_mask"] = torch.cat([mask.new_ones(*mask.shape[:-1], self.encoded), mask], dim=-1)


def words_in(module: Any) -> nn.Module | None:
    """The word embeddings of a model, if it has such."""
    try:
        words = module.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return words if isinstance(getattr(words, "weight", None), Tensor) else None


def positions_in(module: nn.Module) -> int | None:
    """How many positions a table of position embeddings has; None if positions are computed."""
    for name, m in module.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(m, nn.Embedding) and (leaf == "wpe" or ("position" in leaf and "relative" not in leaf)):
            reserved = m.padding_idx + 1 if m.padding_idx is not None else getattr(m, "offset", 0)
            return m.num_embeddings - reserved
    return None
