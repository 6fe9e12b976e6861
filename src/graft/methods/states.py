# SPDX-License-Identifier: Apache-2.0
"""The common part of ReFT and steering vectors: they change hidden states after blocks, at tokens of each
row's prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import get_ident
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import Tensor, nn

from graft.config.fields import Chosen, Targeted
from graft.core.effect import Effect, Rewrite
from graft.core.errors import RoutingError
from graft.core.method import Method
from graft.core.rows import Finish, PerRow, Run, by_name, cache_in, has_state, tokens_seen
from graft.kernels.waits import raise_unless
from graft.methods.bottleneck import PLACES
from graft.methods.places import chosen_blocks, find_width

if TYPE_CHECKING:
    from graft.core.call import Call
    from graft.core.method import Tuner


@dataclass(kw_only=True)
class StatesConfig(Targeted, Chosen):
    layers: Literal["all"] | list[int] = "all"  # numbers of blocks, encoder first

    def __post_init__(self) -> None:
        super().__post_init__()
        self.widths: dict[str, int | None] = {}  # no fields: these hold for one model only
        self.width: int | None = None


S = TypeVar("S", bound=StatesConfig)


@dataclass
class Positions:
    """Where the prompt of each row begins, and how many tokens it has; None for both: everywhere."""

    start: Tensor | None  # (batch,)
    length: Tensor | None  # (batch,)
    passed: Tensor | None = None  # (), how many tokens have passed: the model sees what follows them; None: it sees all

    @classmethod
    def of(cls, mask: object) -> Positions:
        """Return those of an attention mask, (batch, tokens)."""
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return cls(None, None)
        real = mask != 0
        return cls(real.int().argmax(1), real.sum(1))

    def __getitem__(self, index: Tensor) -> Positions:
        if self.start is None or self.length is None:
            return self
        index = index.to(self.start.device)
        return replace(self, start=self.start[index], length=self.length[index])

    def repeat_interleave(self, repeats: int, dim: int) -> Positions:
        if self.start is None or self.length is None:
            return self
        start, length = (t.repeat_interleave(repeats, dim) for t in (self.start, self.length))
        return replace(self, start=start, length=length)


FACT, OF_DECODER = "reft", "reft of a decoder"
MANY = 1 << 30  # more tokens than any input has
TOKENS = {FACT: ("input_ids", "inputs_embeds"), OF_DECODER: ("decoder_input_ids", "decoder_inputs_embeds")}
MASKS = {False: {FACT: "attention_mask"}, True: {FACT: "attention_mask", OF_DECODER: "decoder_attention_mask"}}


def facts_of(arguments: Mapping[str, object], model: nn.Module) -> dict[str, Positions]:
    """Return the positions that the arguments of a forward pass tell."""
    masks = MASKS[is_encoder_decoder(model)]
    facts = {fact: Positions.of(arguments.get(mask)) for fact, mask in masks.items()}
    cache = cache_in(arguments)
    if passed := tokens_seen(cache) or (MANY if has_state(cache) else 0):
        last = list(masks)[-1]
        facts[last] = replace(facts[last], passed=torch.tensor(passed, device="cpu"))
    return facts


def is_encoder_decoder(model: nn.Module) -> bool:
    """Return True if the model's config says that a decoder follows an encoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def numbers_by_row(name: str, value: object, run: Run, holds: Callable[[Tensor], Tensor], text: str) -> Tensor:
    """Return the value of an argument as a number for each row, (batch,), on the device of the batch.

    Raises:
        RoutingError: they are no numbers, or not one for each row, or `holds` is not true of all: with that text.
    """
    try:
        c = torch.as_tensor(value, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError) as e:
        raise RoutingError(f"{name} takes a number, or one for each row, got {value!r}.") from e
    rows = [t for t in (*run.inputs, *run.kwargs.values()) if isinstance(t, Tensor) and t.dim()]
    batch = len(rows[0]) if rows else 1
    if c.dim() > 1 or (c.dim() == 1 and len(c) != batch):
        raise RoutingError(f"{name} has shape {tuple(c.shape)} for a batch of {batch} rows.")
    raise_unless(holds(c).all(), lambda: RoutingError(f"{name} {text}"), f"{name} {text}")
    return (c.to(rows[0].device, non_blocking=True) if rows else c).expand(batch)  # once, and not in each layer


class OnStates(Method[S]):
    """A method that adds `part(x, y)` to the outputs of blocks, or of the modules that `target_modules` names."""

    compresses_targets = False
    acts: str  # for errors: what it does to vectors

    @classmethod
    def default_targets(cls, model: nn.Module) -> str:
        return PLACES

    @classmethod
    def prepare(cls, cfg: S, model: nn.Module) -> None:
        """Set the config's `widths` by path, `target_paths` (the chosen blocks, unless target_modules names modules),
        and `width`.
        """
        blocks = chosen_blocks(model, cfg.layers) if cfg.target_modules == PLACES else []
        cfg.widths = {block.path: block.width for block in blocks}
        cfg.target_paths = set(cfg.widths) or None
        cfg.width = find_width(model)

    @property
    def width(self) -> int | None:
        site = self.site
        return self.cfg.widths.get(site.key) or (site.out_features if site.op.known else self.cfg.width)

    def check(self) -> str | None:
        if self.width is None or (self.site.op.known and len(self.site.shape) != 2):
            return f"{self.acts}: of outputs of linear layers, embeddings, and blocks whose width is known"
        return super().check()

    def describe(self) -> Effect:
        return Rewrite(part=self.part, block=not self.site.op.known)

    def part(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the update of y, (rows, …, H)."""
        raise NotImplementedError

    @property
    def continues(self) -> bool:
        """True for a layer that sees the text that `generate` continues, False for one of an encoder before it."""
        return self.layer.call.fact(OF_DECODER) is None or "decoder." in f"{self.site.key}."

    @property
    def positions(self) -> Positions | None:
        """Where the prompt of each row stands: of the encoder's text or the decoder's; None outside of a call."""
        fact = self.layer.call.fact(OF_DECODER) if self.continues else None
        positions: Positions | None = self.layer.call.fact(FACT) if fact is None else fact
        return positions

    @classmethod
    def facts(cls, run: Run, model: nn.Module) -> dict[str, PerRow]:
        """Return further facts about each row of a run of the base model."""
        return {}

    @classmethod
    @contextmanager
    def surround_run(cls, tuner: Tuner, call: Call, run: Run) -> Iterator[Finish]:
        """Tell the layers where the prompt of each row stands: padding and tokens that `generate` adds do not count."""
        with super().surround_run(tuner, call, run) as finish:
            if tuner.disabled:
                yield finish
                return
            facts: dict[str, PerRow] = {
                **facts_of(run.by_name(tuner.model), tuner.model),
                **cls.facts(run, tuner.model),
            }
            with call.giving(facts=facts), follow_generate(tuner.model, call, run):
                yield finish


def tokens_in(arguments: Mapping[str, object], name: str) -> Tensor | None:
    """Return the tokens or embeddings among a model's arguments that the fact of this name describes; None without
    them.
    """
    return next((t for t in map(arguments.get, TOKENS[name]) if isinstance(t, Tensor)), None)


def end_prompt(fact: Positions, name: str, arguments: Mapping[str, object]) -> Positions:
    """Return a prompt's positions; without a mask, with begin and length set, since `generate` adds tokens
    behind it.
    """
    tokens = tokens_in(arguments, name)
    if fact.start is not None or tokens is None:
        return fact
    length = tokens.new_full((len(tokens),), tokens.shape[1], dtype=torch.long)
    return replace(fact, start=torch.zeros_like(length), length=length)


@contextmanager
def follow_generate(model: nn.Module, call: Call, run: Run) -> Iterator[None]:
    """Give the facts of each step of `generate` to the layers, by a hook on the model, in this thread; do nothing for
    other runs.

    The first step sees the whole prompt. Later ones with a cache see only new tokens: their facts tell how many have
    passed.
    """
    if not run.generates:
        yield
        return
    thread = get_ident()
    first: dict[str, Positions] = {}
    last = list(MASKS[is_encoder_decoder(model)])[-1]
    prompt = seen = 0  # tokens of the first step, and of all steps so far

    def before(_model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        nonlocal prompt, seen
        if get_ident() != thread:  # others may run the model as well
            return
        arguments = by_name(model, args, kwargs)
        now, tokens = facts_of(arguments, model), tokens_in(arguments, last)
        new = 0 if tokens is None else tokens.shape[1]
        begins = not first
        if begins:
            first.update({name: end_prompt(fact, name, arguments) for name, fact in now.items()})
            prompt = new
        steps = dict(first)
        # without a cache the inputs grow: others hold a state that does not tell (RWKV)
        if now[last].passed is not None or (0 < new <= prompt and not begins):
            seen = tokens_seen(cache_in(arguments)) or seen
            steps[last] = replace(first[last], passed=torch.tensor(seen, device="cpu"))
        else:
            seen = 0
        seen += new
        call.put(call.context._replace(facts={**call.context.facts, **steps}))

    handle = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        with call.giving():
            yield
    finally:
        handle.remove()
