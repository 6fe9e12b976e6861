# SPDX-License-Identifier: Apache-2.0
"""FineGates: Train Less, Infer Faster, arXiv 2602.09169.

A gate for each input and each output of a layer. A gate at 0 leaves its row or column of the weight out, and a loss
pulls gates to 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from graft.config.fields import FRACTION, LORA, NOT_NEGATIVE, BaseBias, FanInFanOut, LayerRange, Targeted
from graft.core.each import matrix_methods
from graft.core.effect import Effect, Rewrite
from graft.core.errors import PeftWarning, warn_of_layer
from graft.core.method import Method, PublishedRate, Tuner


@dataclass(kw_only=True)
class FineGatesConfig(Targeted, LayerRange, FanInFanOut, BaseBias):
    """FineGates: factors between 0 and 1 for the inputs and outputs of a layer; many become 0.

    Raises:
        ConfigError: target_sparsity is not between 0 and 1, or a spread or weight is negative.
    """

    peft_type: str = "FINEGATES"
    target_sparsity: Annotated[float, FRACTION] = 0.2  # share of gates that the loss wants closed
    sparsity_loss_weight: Annotated[float, NOT_NEGATIVE] = 1e-2  # of `_get_finegates_loss()`, for the training loop
    gate_init_mean: float = 0.9  # of z; the gate is tanh z + 1/2, cut to [0, 1]: open from 0.55 on
    gate_init_std: Annotated[float, NOT_NEGATIVE] = 0.1
    gate_noise_std: Annotated[float, NOT_NEGATIVE] = 0.0  # of noise in training; without it few open gates learn
    init_weights: bool | None = None  # False: z of N(0, 1), for tests


def find_gates(tuner: Tuner, adapter_names: str | list[str] | None) -> list[FineGates]:
    """Return the FineGates methods of these adapters (a name or a list; None: the active ones) on all layers; of a
    stack one for each matrix.

    They are in the order of layers, then of names. Adapters of other methods are left out.

    Raises:
        AdapterNotFoundError: the model has no adapter of that name.
    """
    names = tuner.active_adapters if adapter_names is None else adapter_names
    names = [names] if isinstance(names, str) else names
    tuner.check_known(names)
    methods = [layer.methods[n] for layer in tuner.layers.values() for n in names if n in layer.methods]
    return [m for method in methods if isinstance(method.matrix_method, FineGates) for m in matrix_methods(method)]


def sparsity_loss(tuner: Tuner, adapter_names: str | list[str] | None = None) -> Tensor | float:
    """Return the mean of `FineGates.loss` over layers and adapters, (); 0.0 without any.

    Terms are added on their own devices.

    `adapter_names`: None for the active ones.

    Raises:
        AdapterNotFoundError: the model has no adapter of that name.
    """
    methods = find_gates(tuner, adapter_names)
    return sum((m.loss() for m in methods), 0.0) / max(1, len(methods))


@torch.no_grad()
def compression(tuner: Tuner, adapter_names: str | list[str] | None = None) -> dict[str, float]:
    """Return the shares of "rows", "columns" and "entries" of the adapted weights that gates at 0 leave out, without
    noise.

    `adapter_names`: None for the active ones. 0 without any gates.
    """
    sizes = torch.zeros(3, 2)  # counts of all; of those with open gates
    for m in find_gates(tuner, adapter_names):
        both = (compute_openness(z) > 0 for z in (m.finegates_rows, m.finegates_columns))  # without noise
        rows, columns = (torch.tensor([len(open_), float(open_.sum())]) for open_ in both)
        sizes += torch.stack([rows, columns, rows * columns])
    shares = (sizes[:, 0] - sizes[:, 1]) / sizes[:, 0].clamp_min(1)
    return dict(zip(("rows", "columns", "entries"), shares.tolist()))


def compute_openness(z: Tensor) -> Tensor:
    """Return tanh z + ½ of z (n,): the gates before they are clamped to [0, 1]."""
    return z.tanh() + 0.5


class FineGates(Method[FineGatesConfig]):
    """FineGates, arXiv 2602.09169: y = r ⊙ base(c ⊙ x), with gates r (out,) and c (in,) in [0, 1]."""

    prefix = "finegates_"
    published_lr = PublishedRate(5e-4, 1e-3, "arXiv 2602.09169, with gate_noise_std 0.1")
    targets = LORA
    tuner_methods = {"_get_finegates_loss": sparsity_loss, "get_finegates_compression_stats": compression}

    finegates_rows: nn.Parameter  # (out,): z of the outputs
    finegates_columns: nn.Parameter  # (in,): z of the inputs

    def check(self) -> str | None:
        """Return a reason against embeddings, since their inputs are ids; else that of `Method.check`."""
        if self.site.op.takes_ids:
            return "FineGates scales inputs, and those of an embedding are ids"
        return super().check()

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return uninitialised parameters `finegates_rows` (out,) and `finegates_columns` (in,).

        Floating-point tensors are made on the default device, in the default dtype.
        """
        rows, columns = torch.empty(self.site.out_features), torch.empty(self.site.in_features)
        return dict(finegates_rows=nn.Parameter(rows), finegates_columns=nn.Parameter(columns))

    def init_values(self) -> None:
        """Fill z with normal values of `gate_init_mean` and `gate_init_std`; with `init_weights=False` of 0 and 1.

        Warns if nearly all gates are open, tanh(mean) > ½ + std, and `gate_noise_std` is 0: such gates get no gradient.
        """
        cfg = self.cfg
        mean, std = (0.0, 1.0) if cfg.init_weights is False else (cfg.gate_init_mean, cfg.gate_init_std)
        for z in (self.finegates_rows, self.finegates_columns):
            nn.init.normal_(z, mean, std)
        if math.tanh(mean) > 0.5 + std and not cfg.gate_noise_std:
            warn_of_layer(
                self.site.key,
                "Nearly all gates of {} are open, where they get no gradient but by noise. Set gate_noise_std (the "
                "paper has 0.1), or gate_init_mean below 0.5.",
                PeftWarning,
            )

    def describe(self) -> Effect:
        """Return a `Rewrite` by `fold`, with `pre` and `post` that scale input and output."""
        return Rewrite(self.fold, pre=self.pre, post=self.post)

    def gate(self, z: Tensor) -> Tensor:
        """Return the gates of z (n,), tanh z + ½ clamped to [0, 1]; in training with noise of std `gate_noise_std`
        before the clamp.
        """
        open_by = compute_openness(z)
        if self.layer.training and self.cfg.gate_noise_std:
            open_by = open_by + torch.randn_like(z) * self.cfg.gate_noise_std
        return open_by.clamp(0, 1)

    def pre(self, x: Tensor) -> Tensor:
        """Return x times the gates of the inputs, without a cast: the wider dtype counts."""
        return x * self.site.op.channels(self.gate(self.finegates_columns))

    def post(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y times the gates of the outputs, without a cast: the wider dtype counts. x is not read."""
        return y * self.site.op.channels(self.gate(self.finegates_rows))

    def fold(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weight with rows and columns times their gates, and the bias (None without one) times the rows'
        gates, both in their own dtypes. Of a convolution with groups, the columns' gates are those of each group.
        """
        rows, columns = (self.gate(z).to(W.dtype) for z in (self.finegates_rows, self.finegates_columns))
        groups = self.site.op.count_groups(self.site.module)
        columns = columns.view(groups, -1).repeat_interleave(W.shape[0] // groups, dim=0)  # (out, in / groups)
        W = W * (rows[:, None] * columns).view(*columns.shape, *[1] * (W.dim() - 2))
        return W, None if b is None else b * rows.to(b.dtype)

    def loss(self) -> Tensor:
        """Return sparsity_loss_weight · ½ Σ |share of open gates - (1 - target_sparsity)| over outputs and inputs, (),
        in float32.

        The share is smooth: the mean of Φ((tanh z + ½) / ½), with Φ the normal distribution.
        """
        cfg = self.cfg
        off: Any = 0.0
        for z in (self.finegates_rows, self.finegates_columns):
            likely = torch.special.ndtr(compute_openness(z.float()) / 0.5)
            off = off + (likely.mean() - (1 - cfg.target_sparsity)).abs()
        return cfg.sparsity_loss_weight * off / 2
