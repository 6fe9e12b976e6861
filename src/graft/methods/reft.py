# SPDX-License-Identifier: Apache-2.0
"""ReFT: Representation Finetuning for Language Models, arXiv 2404.03592: LoReFT, and NoReFT and DiReFT by presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from graft.config.fields import BELOW_1, COUNT
from graft.config.reading import Json
from graft.core.call import Call
from graft.core.errors import ConfigError, RoutingError
from graft.core.method import PublishedRate, Tuner, fill_kaiming, make_dropout
from graft.core.rows import Facts, Run
from graft.methods.bottleneck import ACTIVATIONS, NON_LINEARITY
from graft.methods.states import MASKS, OnStates, StatesConfig, is_encoder_decoder, numbers_by_row


@dataclass(kw_only=True)
class ReftConfig(StatesConfig):
    """ReFT: at some positions of the prompt, hidden states change within r directions: h + Rᵀ(σ(A h + b) - R h).

    `target_modules` in place of `layers`: the adapter acts on the outputs of these modules.

    The prompt of a row ends before its first label other than -100, if the call of a model that can generate has labels
    of tokens. Rows with a label at their first token, and calls without labels, are all prompt. `reft_prompt_lengths=`
    in a call says another length: a number of tokens without padding, or one for each row.

    A decoder that follows an encoder trains on the tokens up to its first label: as a rule the start token alone, from
    which `generate` begins, too. Where that begins with more tokens (Whisper), give their number to the training calls.

    Raises:
        ConfigError: a number out of range.
    """

    peft_type: str = "REFT"
    prefix_positions: int = 3  # how many tokens, from the first
    suffix_positions: int = 0  # how many, up to the last; they win where both meet
    r: Annotated[int, COUNT] = 1
    orthogonality: bool = True  # the rows of R are orthonormal
    subtract_projection: bool = True  # False: without - R h
    tied_weights: bool = False  # one A, R for both ends
    non_linearity: Annotated[str | None, NON_LINEARITY] = None  # σ
    dropout: Annotated[float, BELOW_1] = 0.05  # of the whole state there

    def __post_init__(self) -> None:
        """Validate the fields.

        Raises:
            ConfigError: `prefix_positions` or `suffix_positions` is negative, or both are 0.
        """
        super().__post_init__()
        if min(self.prefix_positions, self.suffix_positions) < 0 or not self.prefix_positions + self.suffix_positions:
            raise ConfigError("`prefix_positions` and `suffix_positions` must not be negative, nor both 0.")

    @classmethod
    def preset(cls, name: str, **changes: object) -> ReftConfig:
        """Return the config of a variant ("loreft", "noreft", "direft"); `changes` override its fields.

        Names are matched exactly, with their case.

        Raises:
            ConfigError: there is no such preset.
        """
        if name not in PRESETS:
            raise ConfigError(f"There is no preset {name!r}; there are {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **changes})


PRESETS: dict[str, Json] = {
    "loreft": {},
    "noreft": dict(orthogonality=False),
    "direft": dict(orthogonality=False, subtract_projection=False),
}


def orthonormal(V: Tensor) -> Tensor:
    """Return rows (r, H) that are orthonormal and span those of V one after another (QR, with signs such that
    orthonormal rows stay).

    Computed in at least float32, returned in V's dtype.
    """
    Q, S = torch.linalg.qr(V.T.to(torch.promote_types(V.dtype, torch.float32)))
    return (Q * S.diagonal().sign()).T.to(V.dtype)


LENGTHS = "reft_prompt_lengths"
IGNORED = -100  # the label of tokens without a loss


class Reft(OnStates[ReftConfig]):
    """ReFT, arXiv 2404.03592: h + Rᵀ(σ(A h + b) - R h) at the first and last tokens of the prompt."""

    prefix = "reft_"
    published_lr = PublishedRate(6e-4, 4e-3, "arXiv 2404.03592, r 4 to 8 (to 9e-4), and its README (4e-3)")
    acts = "ReFT acts on vectors"
    arguments = (LENGTHS,)
    orthonormal = staticmethod(orthonormal)

    reft_A: nn.Linear  # (r, H), of the first tokens; of both ends if tied
    reft_R: nn.Parameter  # (r, H): any rows, also in files; R is their orthonormal form
    reft_A_suffix: nn.Linear
    reft_R_suffix: nn.Parameter
    reft_dropout: nn.Module

    def check(self) -> str | None:
        """Raise ConfigError if r is above the width, with `orthogonality` and a known width; else return the reason of
        `OnStates.check`.
        """
        if self.cfg.orthogonality and self.width is not None and self.cfg.r > self.width:
            raise ConfigError(f"Layer '{self.site.key}' is {self.width} wide. Choose a smaller r than {self.cfg.r}.")
        return super().check()

    @property
    def units(self) -> list[str]:
        """The ends of the names of A and R: "" for the first tokens or tied weights, "_suffix" for the last."""
        cfg = self.cfg
        return [*([""] if cfg.prefix_positions or cfg.tied_weights else []), *self.of_suffix]

    @property
    def of_suffix(self) -> list[str]:
        """["_suffix"] if the last tokens have their own A and R, else []."""
        return ["_suffix"] if self.cfg.suffix_positions and not self.cfg.tied_weights else []

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return, for each of `units`, a linear layer `reft_A…` (r, H) with bias and an uninitialised parameter
        `reft_R…` (r, H). H is 0 for an unknown width. There is also `reft_dropout` (`make_dropout(cfg.dropout)`). They
        are made with torch's default device and dtype.
        """
        H, r = self.width or 0, self.cfg.r
        values: dict[str, object] = {}
        for unit in self.units:
            values[f"reft_A{unit}"] = nn.Linear(H, r)
            values[f"reft_R{unit}"] = nn.Parameter(torch.empty(r, H))
        return values | dict(reft_dropout=make_dropout(self.cfg.dropout))

    def init_values(self) -> None:
        """Fill each R with orthonormal rows; without `orthogonality` kaiming uniform (a=√5).

        A keeps the values of nn.Linear.
        """
        for unit in self.units:
            R = getattr(self, f"reft_R{unit}")
            if self.cfg.orthogonality:
                nn.init.orthogonal_(R)
            else:
                fill_kaiming(R)

    def part(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the update of y, (rows, tokens, H) or (rows, H): nonzero at the first `prefix_positions` and last
        `suffix_positions` of each row's prompt only.

        It has y's shape and the adapter's dtype. Steps of `generate` after the prompt, with a cache, get zeros. Padding
        before the prompt and after a row's length is left out. Where both ends meet, the last positions win. y of two
        dimensions counts as one token per row.

        Raises:
            RoutingError: y has not one row, with tokens, for each sample of the call.
        """
        h = y[:, None] if y.dim() == 2 else y
        delta = torch.zeros_like(h, dtype=self.dtype)
        positions = self.positions
        if positions is not None and positions.passed is not None:
            return delta.view(y.shape)
        lengths = self.layer.call.fact(LENGTHS) if self.continues else None
        row_facts = [t for t in (None if positions is None else positions.start, lengths) if t is not None]
        if h.dim() != 3 or any(len(t) != len(h) for t in row_facts):
            raise RoutingError(
                f"Layer '{self.site.key}' has an output of shape {tuple(y.shape)}: ReFT adapter '{self.name}' needs "
                "one row for each sample, and its tokens. Exclude this layer with exclude_modules."
            )
        T, cfg = h.shape[1], self.cfg
        start = h.new_zeros(len(h), dtype=torch.long)
        length = start + T
        if positions is not None and positions.start is not None and positions.length is not None:
            start, length = positions.start.to(h.device), positions.length.to(h.device)
        if lengths is not None:
            length = torch.minimum(length, lengths.to(h.device))
        p, q = min(cfg.prefix_positions, T), min(cfg.suffix_positions, T)
        first, last = (torch.arange(n, device=h.device) for n in (p, q))
        if p:
            acts = first < (length - q)[:, None]
            delta = self.add_changes("", h, start[:, None] + first, acts, delta)
        if q:
            acts = last >= q - length[:, None]
            unit = "".join(self.of_suffix)
            delta = self.add_changes(unit, h, (start + length - q)[:, None] + last, acts, delta)
        return delta.view(y.shape)

    @classmethod
    def arguments_of(cls, batch: Mapping[str, object], model: nn.Module) -> dict[str, Tensor]:
        """Return `reft_prompt_lengths` (batch,): the number of real tokens before each row's first label other than
        -100.

        In a model with encoder and decoder the count includes the place of that label, since its token comes after it.
        A row with a count of 0 counts all its real tokens. Tokens are real by the batch's attention mask (the
        decoder's); all are without one of the labels' shape. Return {} without labels (batch, tokens), or if the model
        cannot generate.
        """
        labels = batch.get("labels")
        generates = getattr(model, "can_generate", None)
        if not isinstance(labels, Tensor) or labels.dim() != 2 or generates is None or not generates():
            return {}
        decodes = is_encoder_decoder(model)
        mask = batch.get(list(MASKS[decodes].values())[-1])
        real = torch.ones_like(labels, dtype=torch.bool)
        if isinstance(mask, Tensor) and mask.shape == labels.shape:
            real = mask.to(labels.device) != 0
        answer = (labels != IGNORED).int()
        before = answer.cumsum(1) - (answer if decodes else 0)  # a decoder's label is of the token after its place
        lengths = (real & (before == 0)).sum(1)
        return {LENGTHS: torch.where(lengths > 0, lengths, real.sum(1))}

    @classmethod
    def facts_of_run(cls, tuner: Tuner, call: Call, run: Run) -> Facts:
        """Return the positions of each row's prompt, and its length as the fact LENGTHS, int64: the call's
        `reft_prompt_lengths`, else from its labels (`arguments_of`); without both there is no length.

        Raises:
            RoutingError: the lengths are no positive whole numbers, or not one for each row.
        """
        facts, value = super().facts_of_run(tuner, call, run), run.graft_arguments.get(LENGTHS)
        if value is None:
            return {**facts, **cls.arguments_of(run.name_arguments(tuner.model), tuner.model)}
        text = "has a number that is not whole, or below 1. Give the number of tokens of each row's prompt."
        numbers = numbers_by_row(LENGTHS, value, run, lambda n: (n >= 1) & (n == n.floor()), text)
        return {**facts, LENGTHS: numbers.long()}

    def add_changes(self, unit: str, h: Tensor, index: Tensor, acts: Tensor, delta: Tensor) -> Tensor:
        """Return delta plus the changes of h at positions `index` (rows, n), where `acts` is True.

        Positions outside of h are clamped. States are cast to the adapter's dtype, and changes at one position add up.
        """
        index = index.clamp(0, h.shape[1] - 1)[..., None].expand(-1, -1, h.shape[2])
        states = h.gather(1, index).to(self.dtype)
        return delta.scatter_add(1, index, (self.intervene(unit, states) - states) * acts[..., None])

    def intervene(self, unit: str, h: Tensor) -> Tensor:
        """Return dropout(h + Rᵀ z) for h (…, H), z = σ(A h + b) - R h; without `subtract_projection` z = σ(A h + b). σ
        is `non_linearity`, in any case of letters; None: the identity.

        `unit` is the end of the names of A and R; with `orthogonality` R is made orthonormal first.
        """
        cfg, R, A = self.cfg, getattr(self, f"reft_R{unit}"), getattr(self, f"reft_A{unit}")
        R = orthonormal(R) if cfg.orthogonality else R
        z = A(h)
        if cfg.non_linearity is not None:
            z = ACTIVATIONS[cfg.non_linearity.lower()](z)
        if cfg.subtract_projection:
            z = z - h @ R.T
        return self.reft_dropout(h + z @ R)
