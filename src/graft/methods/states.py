# SPDX-License-Identifier: Apache-2.0
"""The common part of ReFT and steering vectors: they change hidden states after blocks, at tokens of each
row's prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from graft.config.fields import Chosen, Targeted
from graft.core.call import Call, in_this_thread
from graft.core.effect import Effect, Rewrite
from graft.core.errors import RoutingError
from graft.core.method import Method, Tuner
from graft.core.rows import Facts, Finish, Run, count_cached_tokens, find_cache, is_stateful, name_arguments
from graft.kernels.waits import raise_unless
from graft.methods.bottleneck import PLACES
from graft.methods.places import chosen_blocks, find_width


@dataclass(kw_only=True)
class StatesConfig(Targeted, Chosen):
    """The fields of ReFT and steering vectors."""

    layers: Literal["all"] | list[int] = "all"  # numbers of blocks, encoder first

    def __post_init__(self) -> None:
        """Validate the fields; set `widths` to {} and `width` to None, which `prepare` fills for one model."""
        super().__post_init__()
        self.widths: dict[str, int | None] = {}  # no fields: these hold for one model only
        self.width: int | None = None


S = TypeVar("S", bound=StatesConfig)


@dataclass
class Positions:
    """The begin and the length of each row's prompt; None for both: everywhere."""

    start: Tensor | None  # (batch,)
    length: Tensor | None  # (batch,)
    passed: Tensor | None = None  # (), number of passed tokens, which the model does not see; None: it sees all

    @classmethod
    def of(cls, mask: object) -> Positions:
        """Return the begin of each row and its number of tokens from an attention mask (batch, tokens); None for both
        without such a mask.

        Entries other than 0 are tokens; a row without any begins at 0 with length 0.
        """
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return cls(None, None)
        real = mask != 0
        return cls(real.int().argmax(1), real.sum(1))

    def __getitem__(self, index: Tensor) -> Positions:
        """Return the positions of the rows `index`, in that order, on the device of the positions; unchanged if they
        hold for all rows.
        """
        if self.start is None or self.length is None:
            return self
        index = index.to(self.start.device)
        return replace(self, start=self.start[index], length=self.length[index])

    def repeat_interleave(self, repeats: int, dim: int) -> Positions:
        """Return the positions for rows that are repeated `repeats` times each, next to each other; unchanged if they
        hold for all rows.
        """
        if self.start is None or self.length is None:
            return self
        start, length = (t.repeat_interleave(repeats, dim) for t in (self.start, self.length))
        return replace(self, start=start, length=length)


FACT, OF_DECODER = "reft", "reft of a decoder"
MANY = 1 << 30  # more tokens than any input has
TOKENS = {FACT: ("input_ids", "inputs_embeds"), OF_DECODER: ("decoder_input_ids", "decoder_inputs_embeds")}
MASKS = {False: {FACT: "attention_mask"}, True: {FACT: "attention_mask", OF_DECODER: "decoder_attention_mask"}}


def facts_of(arguments: Mapping[str, object], model: nn.Module) -> dict[str, Positions]:
    """Return the `Positions` of a forward pass by fact, from its attention masks: FACT from `attention_mask`, and
    OF_DECODER from `decoder_attention_mask` for a model with encoder and decoder.

    With a cache that holds tokens, the last of them also gets the number of tokens that have passed, a CPU tensor; MANY
    if the cache does not count. An empty cache counts as none.
    """
    masks = MASKS[is_encoder_decoder(model)]
    facts = {fact: Positions.of(arguments.get(mask)) for fact, mask in masks.items()}
    cache = find_cache(arguments)
    if passed := count_cached_tokens(cache) or (MANY if is_stateful(cache) else 0):
        last = list(masks)[-1]
        facts[last] = replace(facts[last], passed=torch.tensor(passed, device="cpu"))
    return facts


def is_encoder_decoder(model: nn.Module) -> bool:
    """Return True if the model's config says that a decoder follows an encoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def numbers_by_row(name: str, value: object, run: Run, holds: Callable[[Tensor], Tensor], text: str) -> Tensor:
    """Return the value of an argument as a number for each row, float32 (batch,), on the device of the call's first
    tensor.

    A single number is expanded to all rows. Without tensors in the call, the batch is 1. Bools count as numbers.

    Raises:
        RoutingError: it is no number or list of numbers, there is not one for each row, or `holds` is not True for all
            (with `text`).
    """
    try:
        c = torch.as_tensor(value, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError) as e:
        raise RoutingError(f"{name} takes a number, or one for each row, got {value!r}.") from e
    rows = [t for t in (*run.inputs, *run.kwargs.values()) if isinstance(t, Tensor) and t.dim()]
    batch = len(rows[0]) if rows else 1
    if c.dim() > 1 or (c.dim() == 1 and len(c) != batch):
        raise RoutingError(f"{name} has shape {tuple(c.shape)} for {batch} rows. Give one number, or one per row.")
    raise_unless(holds(c).all(), lambda: RoutingError(f"{name} {text}"), f"{name} {text}")
    return (c.to(rows[0].device, non_blocking=True) if rows else c).expand(batch)  # once, and not in each layer


class OnStates(Method[S]):
    """The base of ReFT and steering vectors: `part(x, y)` is added to the outputs of blocks, or of modules in
    `target_modules`.
    """

    fallback_targets = PLACES  # the blocks that `layers` chooses
    compresses_targets = False
    acts: str  # for errors: the action on vectors, a clause

    @classmethod
    def prepare(cls, cfg: S, model: nn.Module) -> None:
        """Fill three fields of the config: `widths`, `target_paths` and `width`, the model's hidden width.

        If `target_modules` is "places", `widths` has the widths of the chosen blocks, by path, and `target_paths` is
        the set of these paths. Otherwise `widths` is {}. Without any path `target_paths` is None, and no error is
        raised here.
        """
        blocks = chosen_blocks(model, cfg.layers) if cfg.target_modules == PLACES else []
        cfg.widths = {block.path: block.width for block in blocks}
        cfg.target_paths = set(cfg.widths) or None
        cfg.width = find_width(model)

    @property
    def width(self) -> int | None:
        """The width H of the site's output: the block's, else the layer's, else the model's; None if unknown."""
        site = self.site
        return self.cfg.widths.get(site.key) or (site.out_features if site.op.known else self.cfg.width)

    def check(self) -> str | None:
        """Return the reason if the width is unknown, or a known layer's weight is no matrix (a convolution), else that
        of `Method.check`.
        """
        if self.width is None or (self.site.op.known and len(self.site.shape) != 2):
            return f"{self.acts}: of outputs of linear layers, embeddings, and blocks whose width is known"
        return super().check()

    def describe(self) -> Effect:
        """Return a `Rewrite` that adds `part` to the output; of a block if the site's type is unknown."""
        return Rewrite(part=self.part, block=not self.site.op.known)

    def part(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the update of y, (rows, …, H). A subclass overrides it: here NotImplementedError."""
        raise NotImplementedError

    @property
    def continues(self) -> bool:
        """Return True for a layer that sees the text that `generate` continues.

        It is one with "decoder." in its path, or any layer if the call has no positions of a decoder: of a model
        without encoder, or outside of a call.
        """
        return self.layer.call.fact(OF_DECODER) is None or "decoder." in f"{self.site.key}."

    @property
    def positions(self) -> Positions | None:
        """The positions of each row's prompt for this layer, in the encoder's text or the decoder's; None outside of a
        call.
        """
        fact = self.layer.call.fact(OF_DECODER) if self.continues else None
        return self.layer.call.fact(FACT) if fact is None else fact

    @classmethod
    def facts_of_run(cls, tuner: Tuner, call: Call, run: Run) -> Facts:
        """Return the positions of each row's prompt (`facts_of`). Padding and tokens that `generate` adds do not count
        as prompt.
        """
        return {**facts_of(run.name_arguments(tuner.model), tuner.model)}

    @classmethod
    @contextmanager
    def surround_run(cls, tuner: Tuner, call: Call, run: Run) -> Iterator[Finish]:
        """Show `facts_of_run` to the layers within the run, and follow the steps of `generate`. The finish is
        identity."""
        with super().surround_run(tuner, call, run) as finish, follow_generate(tuner.model, call, run):
            yield finish


def tokens_in(arguments: Mapping[str, object], name: str) -> Tensor | None:
    """Return the first tensor among a model's arguments that the fact `name` describes: `input_ids`, then
    `inputs_embeds`; for OF_DECODER those with "decoder_" in front. None without one.
    """
    return next((t for t in map(arguments.get, TOKENS[name]) if isinstance(t, Tensor)), None)


def end_prompt(fact: Positions, name: str, arguments: Mapping[str, object]) -> Positions:
    """Return a prompt's positions.

    Without a mask, but with tokens, they get begin 0 and the tokens' number as length, since `generate` adds tokens
    behind it. With a mask, or without tokens, they are unchanged.
    """
    tokens = tokens_in(arguments, name)
    if fact.start is not None or tokens is None:
        return fact
    length = tokens.new_full((len(tokens),), tokens.shape[1], dtype=torch.long)
    return replace(fact, start=torch.zeros_like(length), length=length)


@contextmanager
def follow_generate(model: nn.Module, call: Call, run: Run) -> Iterator[None]:
    """In the block, show the facts of each step of `generate` to the layers, by a pre-forward hook on the model; do
    nothing for other runs.

    The first step sees the whole prompt, and its positions hold for all steps. Later ones with a cache, or with no more
    tokens than the prompt, see only new tokens: their facts also tell how many have passed. At the end, also on errors,
    the hook is removed and the former facts are back. Calls of other threads change nothing.
    """
    if not run.generates:
        yield
        return
    first: dict[str, Positions] = {}
    last = list(MASKS[is_encoder_decoder(model)])[-1]
    prompt = seen = 0  # tokens of the first step, and of all steps so far

    def before(_model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Put the first step's positions into this thread's call, with the end of its prompt.

        Steps with a filled cache, and later ones with no more tokens than the prompt, also get the number of passed
        tokens: that of the cache, else of the steps so far. Any other step starts this count anew.
        """
        nonlocal prompt, seen
        arguments = name_arguments(model, args, kwargs)
        now, tokens = facts_of(arguments, model), tokens_in(arguments, last)
        new = 0 if tokens is None else tokens.shape[1]
        begins = not first
        if begins:
            first.update({name: end_prompt(fact, name, arguments) for name, fact in now.items()})
            prompt = new
        steps = dict(first)
        # without a cache the inputs grow: others hold a state that does not tell (RWKV)
        if now[last].passed is not None or (0 < new <= prompt and not begins):
            seen = count_cached_tokens(find_cache(arguments)) or seen
            steps[last] = replace(first[last], passed=torch.tensor(seen, device="cpu"))
        else:
            seen = 0
        seen += new
        call.swap_context(call.context._replace(facts={**call.context.facts, **steps}))

    with model.register_forward_pre_hook(in_this_thread(before), with_kwargs=True), call.extend_context():
        yield
