# SPDX-License-Identifier: Apache-2.0
"""ReFT: Representation Finetuning for Language Models, arXiv 2404.03592: LoReFT, and NoReFT and DiReFT by presets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graft.config.fields import require_positive_rank
from graft.config.reading import Json
from graft.core.dropout import dropout_for
from graft.core.errors import ConfigError, RoutingError
from graft.core.published import Published
from graft.methods.bottleneck import ACTIVATIONS
from graft.methods.states import OnStates, StatesConfig


@dataclass(kw_only=True)
class ReftConfig(StatesConfig):
    """ReFT: at some positions of the prompt, hidden states change within r directions: h + Rᵀ(σ(A h + b) - R h).

    `target_modules` in place of `layers`: the adapter acts on the outputs of these modules.

    A decoder that follows an encoder generates from a prompt of one token, while it trains on whole targets: there
    `prefix_positions=1` or the numbers of the encoder's `layers` have both act on the same tokens.

    Raises:
        ConfigError: a number out of range.
    """

    peft_type: str = "REFT"
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
    def preset(cls, name: str, **changes: object) -> ReftConfig:
        """Return the config of a variant ("loreft", "noreft", "direft") with some fields changed.

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
    """Return rows that span those of V (r, H), one after another: V itself if its rows are orthonormal."""
    Q, S = torch.linalg.qr(V.T.to(torch.promote_types(V.dtype, torch.float32)))
    R: Tensor = (Q * S.diagonal().sign()).T
    return R.to(V.dtype)


class Reft(OnStates[ReftConfig]):
    """h + Rᵀ(σ(A h + b) - R h) at the first and last tokens of the prompt."""

    prefix = "reft_"
    published_lr = Published(6e-4, 4e-3, "arXiv 2404.03592, r 4 to 8 (to 9e-4), and its README (4e-3)")
    acts = "ReFT acts on vectors"

    reft_A: nn.Linear  # (r, H), of the first tokens; of both ends if tied
    reft_R: nn.Parameter  # (r, H): any rows, also in files; R is their orthonormal form
    reft_A_suffix: nn.Linear
    reft_R_suffix: nn.Parameter
    reft_dropout: nn.Module

    def check(self) -> str | None:
        if self.cfg.orthogonality and self.width is not None and self.cfg.r > self.width:
            raise ConfigError(f"Layer '{self.site.key}' is {self.width} wide: choose a smaller r than {self.cfg.r}.")
        return super().check()

    @property
    def units(self) -> list[str]:
        """The ends of the names of A and R, for the first tokens and for the last."""
        cfg = self.cfg
        return [*([""] if cfg.prefix_positions or cfg.tied_weights else []), *self.of_suffix]

    @property
    def of_suffix(self) -> list[str]:
        return ["_suffix"] if self.cfg.suffix_positions and not self.cfg.tied_weights else []

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        H, r = self.width or 0, self.cfg.r
        made: dict[str, object] = {}
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

    def part(self, x: Tensor, y: Tensor) -> Tensor:
        """Return what is added to y, (rows, tokens, H) or (rows, H)."""
        h = y[:, None] if y.dim() == 2 else y
        delta = torch.zeros_like(h, dtype=self.dtype)
        positions = self.positions
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
        if positions is not None and positions.start is not None and positions.length is not None:
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
