# SPDX-License-Identifier: Apache-2.0
"""The stack of layers of a base model, where a prompt enters, and the prompt of the call that runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from threading import local
from typing import Any

import torch
from torch import Tensor, nn

from graft.prompts import kv_prefix
from graft.prompts.replays import Replays
from graft.storage.find import find_device_and_dtype
from graft.storage.fsdp2 import find_compute_dtype


def find_first_input(arguments: dict[str, object]) -> Any:
    """Return the input of a call: `inputs_embeds` (batch, tokens, dim) if not None, else `input_ids` (batch, tokens);
    None without one.
    """
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    return ids if embeds is None else embeds


def layers_in(module: nn.Module) -> dict[int, nn.Module]:
    """Return a module of each layer by the layer's number, where modules have one (`layer_idx`); the last with it
    counts; {} without any.
    """
    numbered = [(getattr(m, "layer_idx", None), m) for m in module.modules()]
    return {i: m for i, m in numbered if isinstance(i, int)}


def words_in(module: nn.Module) -> nn.Module | None:
    """Return the word embeddings of a model, from `get_input_embeddings`.

    None if the model lacks that method or it is not implemented, or if their weight is no tensor.
    """
    try:
        words = module.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return words if isinstance(getattr(words, "weight", None), Tensor) else None


def positions_in(module: nn.Module) -> int | None:
    """Return the number of positions in the first table of position embeddings, without reserved rows.

    A table is an Embedding named "wpe", or with "position" and without "relative" in its name. Reserved rows are
    padding_idx + 1, else its `offset`. None if the model has no such table: it computes positions.
    """
    for name, m in module.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(m, nn.Embedding) and (leaf == "wpe" or ("position" in leaf and "relative" not in leaf)):
            reserved = m.padding_idx + 1 if m.padding_idx is not None else getattr(m, "offset", 0)
            return m.num_embeddings - reserved
    return None


NEW_CACHE, OLD_CACHE = CACHES = ("cache", "past_key_values")  # the argument in transformers from 5.2x on, and before
TEXT_PARTS = ("language_model", "text_model", "decoder")  # inside models that read images as well, and OPT


def stacks_of(model: nn.Module) -> dict[str, PromptStack]:
    """Return {"main": stack} of a model; for an encoder-decoder the encoder's as "main", and the decoder's as
    "decoder".

    The config's `is_encoder_decoder` decides. Otherwise the main stack is the part named `base_model_prefix`, or in it
    the innermost text part (`TEXT_PARTS`), as of a model that reads images as well. The model itself is used if that is
    no module.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return {"main": PromptStack(model.get_encoder(), model), "decoder": PromptStack(model.get_decoder(), model)}
    inner = outer = getattr(model, getattr(model, "base_model_prefix", "") or "", model)
    while (part := next((p for n in TEXT_PARTS if (p := getattr(inner, n, None)) is not None), None)) is not None:
        inner = part
    return {"main": PromptStack(inner if isinstance(inner, nn.Module) else model, model, outer)}


@dataclass
class Visit:
    """The prompt that enters a stack during one call of the model, and how far it got."""

    replays: Replays
    tokens: int = 0
    embeddings: Tensor | None = None
    keys: Tensor | None = None
    as_pairs: Callable[[Tensor], list[tuple[Tensor, Tensor]]] | None = None
    encoded: int = 0  # tokens of a prompt at the front of the encoder's output
    covered: bool = False  # the attention mask has columns for the prompt already
    strips: bool = False  # the output comes back without the prompt's tokens
    visited: bool = False
    entered: bool = False
    widened_outside: bool = False
    lent: object = None  # a cache for the prompt only, which the output leaves out


class Visits(local):
    """The visit of a stack that this thread is in; one without a prompt if it is in none."""

    def __init__(self, stack: PromptStack):  # runs in each thread
        """Start with a visit without prompt. Python calls this again in each thread that reads the object."""
        self.stack = stack
        self.now = Visit(Replays(stack))

    def __reduce__(self) -> tuple[type[Visits], tuple[PromptStack]]:
        """Return the class and the stack: a copy or pickle starts with a new visit."""
        return Visits, (self.stack,)


class PromptStack:
    """The module of a model where prompts enter (`entry.attach`).

    `put_…` sets the prompt of the call that `begin` began.

    Callers pass positions, masks and types for the input's tokens alone. `entry` extends them to the prompt, in each
    later step too, when the cache holds the prompt.

    Args:
        outer: the module that calls `module` in a model that reads images as well. It may make masks and positions
            from the cache, so in later steps it must already see the prompt.
    """

    def __init__(self, module: nn.Module, model: nn.Module, outer: object = None):
        """Read the facts of the module: arguments, cache, positions, layers, shapes and cuts of keys.

        Nothing is attached yet.
        """
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
        self.attached = False
        self.here = Visits(self)

    @property
    def now(self) -> Visit:
        """The visit of the stack that this thread is in; one without a prompt outside of calls."""
        return self.here.now

    def begin(self) -> Visit:
        """Begin a call in this thread, as yet without a prompt. Return the visit around it, for `end`.

        Calls nest where, say, a logits processor calls the model.
        """
        outer, self.here.now = self.here.now, Visit(Replays(self))
        return outer

    def end(self, outer: Visit) -> None:
        """End the call of this thread: restore its checkpointed layers and release their lock (`Replays.clear`); make
        `outer` the visit again. If the former fails, `outer` is not restored.
        """
        self.now.replays.clear()
        self.here.now = outer

    def put_embeddings(self, value: Tensor) -> None:
        """Note embeddings to put before the input of the present visit, and their number of tokens.

        `value`: (1 or batch, tokens, dim).
        """
        self.now.embeddings, self.now.tokens = value, value.shape[1]

    def put_keys(self, value: Tensor, as_pairs: Callable[[Tensor], list[tuple[Tensor, Tensor]]]) -> None:
        """Note keys and values for the present visit, which go before each layer's, and their number of tokens.

        as_pairs: makes them from `value` (…, tokens, numbers).
        """
        self.now.keys, self.now.as_pairs, self.now.tokens = value, as_pairs, value.shape[-2]

    @property
    def words(self) -> nn.Module | None:
        """The word embeddings that the stack's module or else the model has now: an adapter may have other ones.

        None without any.
        """
        return words_in(self.module) or words_in(self.model)

    @property
    def width(self) -> int | None:
        """The width of the word embeddings, None without any. Layers may be wider, and project them."""
        words = self.words
        return None if words is None else words.weight.shape[1]

    @property
    def device(self) -> torch.device:
        """The device of the word embeddings, or of the module if FSDP has left these without parameters.

        Raises StopIteration if neither has one.
        """
        parts = (self.words or self.module, self.module)  # FSDP may leave the word embeddings without parameters
        return next(device for part in parts if (device := find_device_and_dtype(part)[0]) is not None)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of FSDP2's mixed precision; without it that of the module's first floating-point parameter (else
        StopIteration).
        """
        dtype = find_compute_dtype(self.module)
        return next(p.dtype for p in self.module.parameters() if p.is_floating_point()) if dtype is None else dtype

    def check_visited(self) -> None:
        """Raise RuntimeError if the present visit has a prompt and the model never ran this module: it had no
        effect.
        """
        if self.now.tokens and not self.now.visited:
            raise RuntimeError(
                f"The base model never called its {type(self.module).__name__}, where the prompt enters. Use a method "
                "that acts on layers, such as LORA."
            )

    def fill_cache(self, cache: object, pairs: kv_prefix.Pairs, batch: int) -> object:
        """Put a prompt's pairs into a cache, in place, and return it; into a new one of the config's kind if `cache` is
        None.

        Only this process's heads are put, in the stack's dtype and on each layer's device. No more pairs are put than
        the module has numbered layers; all, if it has none.
        """
        if cache is None:
            cache = kv_prefix.new_cache(self.config, self.in_pair)
        pairs = pairs[: len(self.layers) or None]  # the config counts the encoder's layers, which may be more
        pairs = kv_prefix.cut_heads(pairs, self.cuts)
        return kv_prefix.fill_cache(cache, pairs, batch, self.dtype, self.devices(len(pairs)))

    def devices(self, layers: int) -> list[torch.device]:
        """Return the device of each of the first `layers` layers.

        A layer with an unknown number or without a device, or on the meta device, counts as on the stack's device.
        """
        parts = [self.layers.get(i, self.module) for i in range(layers)]
        where = [find_device_and_dtype(part)[0] or self.device for part in parts]
        return [self.device if d.type == "meta" else d for d in where]
