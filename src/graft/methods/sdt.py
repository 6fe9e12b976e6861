# SPDX-License-Identifier: Apache-2.0
"""SDT: Parameter-Efficient Fine-Tuning of State Space Models, arXiv 2410.09016 (SDLoRA in its first version).

Of each mixer of a Mamba some channels train, and of these some states: entries of A_log, and the columns of x_proj that
make B and C of such a channel. Layers outside of the state space have LoRA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from torch import Tensor, nn

from graft.config.bounds import must_be
from graft.config.fields import BELOW_1, COUNT, TARGETS, LayerRange, Targeted
from graft.core.containers import CheckpointOnly
from graft.core.effect import Effect, Factors, Update
from graft.core.method import Method, PublishedRate, Tensors, fill_kaiming, make_dropout
from graft.kernels.sparse import Scattered
from graft.methods.places import walk
from graft.methods.shira import with_places

A_LOG, X_PROJ = "A_log", "x_proj"
SHARE = must_be("above 0 and at most 1", lambda share: 0 < share <= 1)


@dataclass(kw_only=True)
class SdtConfig(Targeted, LayerRange):
    """SDT: some channels and states of a Mamba's state space train, and LoRA on the layers around it.

    `graft.preprocess_sdt` finds which, by a short training. Targets of mixers are `A_log` (in `target_parameters`) and
    `x_proj`; every other target has LoRA.

    Raises:
        ConfigError: a number out of range.
    """

    peft_type: str = "SDT"
    channels: Annotated[float, SHARE] = 0.01  # share of the channels of a mixer that train, one at least
    states: Annotated[float, SHARE] = 0.25  # share of a channel's states, one at least; in the paper 0.05 to 0.25
    r: Annotated[int, COUNT] = 8  # rank of LoRA on other layers
    lora_alpha: float = 8  # LoRA's update counts alpha / r times
    lora_dropout: Annotated[float, BELOW_1] = 0.0  # of LoRA
    target_parameters: list[str] | None = None  # None: A_log of each mixer
    init_weights: bool = True  # zeros; False: random ones at random places, for tests

    def __post_init__(self) -> None:
        """Validate the fields; set `mixers` to {}, which `prepare` fills for one model."""
        super().__post_init__()
        self.mixers: dict[str, Mixer] = {}  # no field: they are those of one model


class Mixer(NamedTuple):
    """The sizes of a mixer's state space."""

    channels: int
    states: int

    def some(self, cfg: SdtConfig) -> tuple[int, int]:
        """Return the number of channels that train, and of states of each: the config's shares, rounded, at least 1."""
        return max(1, round(cfg.channels * self.channels)), max(1, round(cfg.states * self.states))


def mixers_of(model: nn.Module) -> dict[str, Mixer]:
    """Return, by path, the modules with A_log (channels, states) and an x_proj with `channels` inputs, as in a Mamba;
    {} without any.
    """
    mixers, linears = {}, {}
    for path, module in walk(model):
        A = module._parameters.get(A_LOG)
        if A is not None and A.dim() == 2:
            mixers[path] = Mixer(*A.shape)
        linears[path] = getattr(module, "in_features", None)
    return {path: m for path, m in mixers.items() if linears.get(f"{path}.{X_PROJ}") == m.channels}


def strongest(change: Tensor, channels: int, states: int) -> tuple[Tensor, Tensor]:
    """Return the `channels` channels (c,) with the largest sum of squares in `change` (channels, states), and the
    `states` largest states of each (c, s).

    Both are in ascending order; squares are taken in float32.
    """
    squared = change.float().square()
    some = squared.sum(1).topk(channels).indices.sort().values
    return some, squared[some].topk(states, 1).indices.sort(1).values


class SDT(Method[SdtConfig]):
    """SDT, arXiv 2410.09016: ΔW = v at some entries of A_log and x_proj; ΔW = s · B A on layers that are not of a state
    space.
    """

    prefix = "sdt_"
    ungrouped = "SDT has no factors for a convolution with groups"
    facts = ()
    lays_out_stacks = True  # it takes none
    published_lr = PublishedRate(4e-3, 4e-3, "arXiv 2410.09016, Mamba of 130M parameters")
    targets = TARGETS["SDT"]  # A_log of their mixers as well
    base_mark = "_graft_sdt_change"  # of A_log in the warm-up, on the mixer and its x_proj

    sdt_weight: nn.Parameter  # v (k,)
    sdt_indices: Tensor  # (2, k) int32: row and column of each
    sdt_A: nn.Parameter  # (r, fan_in)
    sdt_B: nn.Parameter  # (out, r)
    sdt_dropout: nn.Module

    @classmethod
    def prepare(cls, cfg: SdtConfig, model: nn.Module) -> None:
        """Set `cfg.mixers` to the model's mixers by path, and `target_parameters`, if it is None, to ["A_log"] if there
        are any.
        """
        cfg.mixers = mixers_of(model)
        if cfg.target_parameters is None:
            cfg.target_parameters = [A_LOG] if cfg.mixers else None

    @property
    def mixer(self) -> Mixer | None:
        """The sizes of the mixer, if the site is its A_log or x_proj; None for other sites."""
        path, _, name = self.site.key.rpartition(".")
        return self.cfg.mixers.get(path) if name in (A_LOG, X_PROJ) else None

    @property
    def size(self) -> int:
        """The number of entries that train: channels · states of A_log, channels · 2 · all states of x_proj (the rows
        of B and C). AssertionError outside of a mixer.
        """
        assert self.mixer is not None
        channels, states = self.mixer.some(self.cfg)
        return channels * (states if self.site.op.opaque else 2 * self.mixer.states)

    def check(self) -> str | None:
        """Return a reason against parameters other than a mixer's A_log; else that of `Method.check`."""
        if self.mixer is None and self.site.op.opaque:
            return f"SDT trains {A_LOG} of a Mamba's mixer, (channels, states), and LoRA on modules"
        return super().check()

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return, in a mixer, `sdt_weight` (k,) of zeros and the places `sdt_indices` (2, k) int32, which files hold.

        Elsewhere uninitialised `sdt_A` (r, fan_in), `sdt_B` (out, r) of zeros, and `sdt_dropout`
        (`make_dropout(cfg.lora_dropout)`). Floating-point tensors are made on the default device, in the default dtype.
        """
        cfg, site = self.cfg, self.site
        if self.mixer is not None:
            indices = CheckpointOnly(torch.zeros(2, self.size, dtype=torch.int32))
            return dict(sdt_weight=nn.Parameter(torch.zeros(self.size)), sdt_indices=indices)
        return dict(
            sdt_A=nn.Parameter(torch.empty(cfg.r, site.fan_in)),
            sdt_B=nn.Parameter(torch.zeros(site.out_features, cfg.r)),
            sdt_dropout=make_dropout(cfg.lora_dropout),
        )

    @torch.no_grad()
    def init_values(self) -> None:
        """Fill the places in a mixer from the change that `preprocess_sdt` has left (`strongest`); v stays 0.

        Elsewhere A is kaiming uniform (a=√5), B 0.

        With `init_weights=False` a random change gives the places, v is normal, and B normal with std 1/√r.

        Raises:
            CalibrationError: there is no change.
        """
        drawn = not self.cfg.init_weights
        if self.mixer is None:
            fill_kaiming(self.sdt_A)
            self.fill_start(self.sdt_B, self.cfg.r**-0.5)
            return
        change = torch.randn(self.mixer, device="cpu") if drawn else self.change()
        self.sdt_indices.copy_(self.places(*strongest(change, *self.mixer.some(self.cfg))))
        self.fill_start(self.sdt_weight, 1.0)

    def places(self, channels: Tensor, states: Tensor) -> Tensor:
        """Return the row and the column of each entry that trains, (2, k), for a site in a mixer (else AssertionError).

        Of A_log: each channel with its states. Of x_proj: the channels, as columns, in each of the last 2 · states
        rows.
        """
        assert self.mixer is not None
        if self.site.op.opaque:
            return torch.stack([channels[:, None].expand_as(states).flatten(), states.flatten()])
        out = self.site.out_features
        rows = torch.arange(out - 2 * self.mixer.states, out, device=channels.device)  # of B, then of C
        return torch.stack([rows.repeat_interleave(len(channels)), channels.repeat(len(rows))])

    def change(self) -> Tensor:
        """Take the change of A_log (channels, states) that `preprocess_sdt` has left on the base module, remove it
        there, and return it.

        Raises:
            CalibrationError: there is none.
        """
        return self.take_from_base(
            f"It is not known which channels of layer '{self.site.key}' adapter '{self.name}' trains. Call "
            "preprocess_sdt with this model and config before.",
        )

    def describe(self) -> Effect:
        """Return an `Update` by `delta` in a mixer, else by `factors`."""
        return Update(factors=self.factors) if self.mixer is None else Update(self.delta)

    def factors(self) -> Factors:
        """Return `sdt_A` and `sdt_B` with the scale alpha / r and dropout."""
        return Factors(self.sdt_A, self.sdt_B, self.cfg.lora_alpha / self.cfg.r, self.sdt_dropout)

    def delta(self) -> Scattered:
        """Return ΔW with v at its places, 0 elsewhere, as a `Scattered`."""
        rows, columns = self.sdt_indices.long()
        return Scattered(self.sdt_weight, rows * self.site.fan_in + columns, self.site.shape)

    def from_file_tensors(self, tensors: Tensors, cfg: SdtConfig) -> Tensors:
        """Return the file's tensors with the places as int32; unchanged if it has none.

        Raises CheckpointError if they are outside of the weight.
        """
        return with_places(tensors, "sdt_indices", self.site)
