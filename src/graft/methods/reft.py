# SPDX-License-Identifier: Apache-2.0
"""ReFT: Representation Finetuning for Language Models, arXiv 2404.03592: LoReFT, and NoReFT and DiReFT by presets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import get_ident
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graft.config.fields import Targeted, require_positive_rank
from graft.core.dropout import dropout_for
from graft.core.effect import Effect, Rewrite
from graft.core.errors import ConfigError, RoutingError
from graft.core.method import Method
from graft.core.rows import Run
from graft.methods.bottleneck import ACTIVATIONS, PLACES
from graft.methods.places import chosen_blocks, hidden_size


@dataclass(kw_only=True)
class ReftConfig(Targeted):
    """ReFT: at some positions of the prompt, hidden states change within r directions: h + Rᵀ(σ(A h + b) - R h).

    `target_modules` in place of `layers`: the adapter acts on the outputs of these modules.

    Raises:
        ConfigError: a number out of range.
    """

    peft_type: Any = "REFT"
    layers: Literal["all"] | list[int] = "all"  # numbers of blocks, encoder first
    prefix_positions: int = 3  # how many tokens, from the first
    suffix_positions: int = 0  # how many, up to the last; they win where both meet
    r: int = 1
    orthogonality: bool = True  # the rows of R are orthonormal
    subtract_projection: bool = True  # False: without - R h
    tied_weights: bool = False  # one A, R for both ends
    non_linearity: str | None = None  # σ
    dropout: float = 0.05  # of the whole state there

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_rank(self.r)
        if min(self.prefix_positions, self.suffix_positions) < 0 or not self.prefix_positions + self.suffix_positions:
            raise ConfigError("`prefix_positions` and `suffix_positions` must not be negative, nor both 0.")
        if self.non_linearity is not None and self.non_linearity.lower() not in ACTIVATIONS:
            raise ConfigError(f"Unknown non_linearity {self.non_linearity!r}. Known: {', '.join(ACTIVATIONS)}.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"`dropout` must be at least 0 and below 1, got {self.dropout}.")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> ReftConfig:
        """Return the config of a variant ("loreft", "noreft", "direft") with some fields changed.

        Raises:
            ConfigError: there is no such preset.
        """
        if name not in PRESETS:
            raise ConfigError(f"There is no preset {name!r}; there are {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **changes})


PRESETS: dict[str, dict[str, Any]] = {
    "loreft": {},
    "noreft": dict(orthogonality=False),
    "direft": dict(orthogonality=False, subtract_projection=False),
}


def orthonormal(V: Tensor) -> Tensor:
    """Return rows that span those of V (r, H), one after another: V itself if its rows are orthonormal."""
    Q, S = torch.linalg.qr(V.T.to(torch.promote_types(V.dtype, torch.float32)))
    R: Tensor = (Q * S.diagonal().sign()).T
    return R.to(V.dtype)


@dataclass
class Positions:
    """Where the prompt of each row begins, and how many tokens it has; None for both: everywhere."""

    start: Tensor | None  # (batch,)
    length: Tensor | None  # (batch,)
    acts: bool = True  # False: the prompt has passed

    @classmethod
    def of(cls, mask: Any) -> Positions:
        """Return those of an attention mask, (batch, tokens)."""
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return cls(None, None)
        real = mask != 0
        return cls(real.int().argmax(1), real.sum(1))

    def __getitem__(self, index: Any) -> Positions:
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
CACHES = ("cache", "past_key_values")  # the argument in transformers from 5.2x on, and before
MASKS = {False: {FACT: "attention_mask"}, True: {FACT: "attention_mask", OF_DECODER: "decoder_attention_mask"}}


def facts_of(arguments: Mapping[str, Any], model: Any) -> dict[Any, Any]:
    """Return the positions that the arguments of a forward pass tell."""
    twofold = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    facts = {fact: Positions.of(arguments.get(mask)) for fact, mask in MASKS[twofold].items()}
    cache: Any = next((arguments[name] for name in CACHES if arguments.get(name) is not None), None)
    if hasattr(cache, "get_seq_length") and int(cache.get_seq_length()) > 0:
        last = OF_DECODER if twofold else FACT
        facts[last] = replace(facts[last], acts=False)
    return facts


class Reft(Method):
    """h + Rᵀ(σ(A h + b) - R h) at the first and last tokens of the prompt."""

    config = ReftConfig
    prefix = "reft_"
    compresses_targets = False

    reft_A: nn.Linear  # (r, H), of the first tokens; of both ends if tied
    reft_R: nn.Parameter  # (r, H): any rows, also in files; R is their orthonormal form
    reft_A_suffix: nn.Linear
    reft_R_suffix: nn.Parameter
    reft_dropout: nn.Module

    @classmethod
    def default_targets(cls, model: Any) -> str:
        return PLACES

    @classmethod
    def prepare(cls, cfg: Any, model: nn.Module) -> None:
        cfg.widths = {}  # no fields, this and the next: they hold for this model only
        if cfg.target_modules == PLACES:
            cfg.widths = {block.path: block.width for block in chosen_blocks(model, cfg.layers)}
        cfg.target_paths = set(cfg.widths) or None
        cfg.width = hidden_size(model)

    @property
    def width(self) -> int | None:
        site = self.site
        found: int | None = self.cfg.widths.get(site.key)
        return found or (site.out_features if site.op.known else self.cfg.width)

    def check(self) -> str | None:
        if self.width is None or (self.site.op.known and len(self.site.shape) != 2):
            return "ReFT acts on vectors: on outputs of linear layers, embeddings, and blocks whose width is known"
        if self.cfg.orthogonality and self.cfg.r > self.width:
            raise ConfigError(f"Layer '{self.site.key}' is {self.width} wide: choose a smaller r than {self.cfg.r}.")
        return super().check()

    def describe(self) -> Effect:
        return Rewrite(part=self.part, block=not self.site.op.known)

    @property
    def units(self) -> list[str]:
        """The ends of the names of A and R, for the first tokens and for the last."""
        cfg = self.cfg
        return [*([""] if cfg.prefix_positions or cfg.tied_weights else []), *self.of_suffix]

    @property
    def of_suffix(self) -> list[str]:
        return ["_suffix"] if self.cfg.suffix_positions and not self.cfg.tied_weights else []

    def build(self, shared: dict[str, Any]) -> dict[str, Any]:
        H, r = self.width or 0, self.cfg.r
        made: dict[str, Any] = {}
        for unit in self.units:
            made[f"reft_A{unit}"] = nn.Linear(H, r)
            made[f"reft_R{unit}"] = nn.Parameter(torch.empty(r, H))
        return made | dict(r=r, reft_dropout=dropout_for(self.cfg.dropout))

    def init(self) -> None:
        for unit in self.units:
            R = getattr(self, f"reft_R{unit}")
            if self.cfg.orthogonality:
                nn.init.orthogonal_(R)
            else:
                nn.init.kaiming_uniform_(R, a=5**0.5)

    def part(self, x: Any, y: Tensor) -> Tensor:
        """Return what is added to y, (rows, tokens, H) or (rows, H)."""
        h = y[:, None] if y.dim() == 2 else y
        delta = torch.zeros_like(h, dtype=self.dtype)
        positions = self.layer.call.fact(OF_DECODER if self.in_decoder else FACT)
        if positions is not None and not positions.acts:
            return delta.view(y.shape)
        if h.dim() != 3 or (positions is not None and positions.start is not None and len(positions.start) != len(h)):
            raise RoutingError(
                f"Layer '{self.site.key}' has an output of shape {tuple(y.shape)}: ReFT adapter '{self.name}' needs "
                "one row for each sample, and its tokens."
            )
        T, cfg = h.shape[1], self.cfg
        start = h.new_zeros(len(h), dtype=torch.long)
        length = start + T
        if positions is not None and positions.start is not None:
            start, length = positions.start.to(h.device), positions.length.to(h.device)
        p, q = min(cfg.prefix_positions, T), min(cfg.suffix_positions, T)
        first, last = (torch.arange(n, device=h.device) for n in (p, q))
        if p:
            acts = first < (length - q)[:, None]
            delta = self.added("", h, start[:, None] + first, acts, delta)
        if q:
            acts = last >= q - length[:, None]
            unit = "".join(self.of_suffix)
            delta = self.added(unit, h, (start + length - q)[:, None] + last, acts, delta)
        return delta.view(y.shape)

    @property
    def in_decoder(self) -> bool:
        """Return True if the layer is one of an encoder-decoder's decoder."""
        return self.layer.call.fact(OF_DECODER) is not None and "decoder." in f"{self.site.key}."

    def added(self, unit: str, h: Tensor, index: Tensor, acts: Tensor, delta: Tensor) -> Tensor:
        """Return delta with the changes of h at positions (rows, n), where they count."""
        index = index.clamp(0, h.shape[1] - 1)[..., None].expand(-1, -1, h.shape[2])
        own = h.gather(1, index).to(self.dtype)
        return delta.scatter_add(1, index, (self.changed(unit, own) - own) * acts[..., None])

    def changed(self, unit: str, h: Tensor) -> Tensor:
        """Return h' for h (…, H)."""
        cfg, R, A = self.cfg, getattr(self, f"reft_R{unit}"), getattr(self, f"reft_A{unit}")
        R = orthonormal(R) if cfg.orthogonality else R
        z = A(h)
        if cfg.non_linearity is not None:
            z = ACTIVATIONS[cfg.non_linearity.lower()](z)
        if cfg.subtract_projection:
            z = z - h @ R.T
        out: Tensor = self.reft_dropout(h + z @ R)
        return out

    @classmethod
    @contextmanager
    def around(cls, tuner: Any, call: Any, run: Run) -> Iterator[Callable[[Any], Any]]:
        """Tell the layers where the prompt of each row stands: padding does not count, nor what `generate` adds."""
        with super().around(tuner, call, run) as finish:
            if tuner.disabled:
                yield finish
                return
            facts = facts_of(run.kwargs, tuner.model)
            with call.giving(facts=facts), following(tuner.model, call, run):
                yield finish


@contextmanager
def following(model: nn.Module, call: Any, run: Run) -> Iterator[None]:
    """Give the facts of each step of `generate`: the first sees the prompt, further ones with a cache do nothing."""
    if not run.generates:
        yield
        return
    thread = get_ident()
    first: dict[Any, Any] = {}

    def before(_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if get_ident() != thread:  # others may run the model as well
            return
        now = facts_of(kwargs, model)
        if not first:
            first.update(now)
        steps = {name: fact if not fact.acts else first[name] for name, fact in now.items()}
        call.put(call.given._replace(facts={**call.given.facts, **steps}))

    handle = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        with call.giving():
            yield
    finally:
        handle.remove()
