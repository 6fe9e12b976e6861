# SPDX-License-Identifier: Apache-2.0
"""DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models, NeurIPS 2025; with `para`, PaRa."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from graft.config.fields import COUNT, LORA, BaseBias, FanInFanOut, LayerRange, Targeted
from graft.core.effect import Effect, Factors, Product, Update
from graft.core.method import Method, WeightUse
from graft.kernels.narrow import multiply_widened


@dataclass(kw_only=True)
class DeftConfig(Targeted, LayerRange, FanInFanOut, BaseBias):
    """DEFT: in the space of P's columns, P R replaces the weight."""

    peft_type: str = "DEFT"
    r: Annotated[int, COUNT] = 8
    decomposition_method: Literal["relu", "qr"] = "relu"  # how P becomes the pair of projections
    init_scale: float = 1.0  # of a random R
    alpha: int | None = None  # R counts alpha / r times; None: once
    para: bool = False  # PaRa: there is no R, the space is only taken out
    deft_dropout: float = 0.0  # acts on the input of R
    init_weights: bool = True  # R starts so that the update is 0; else random


class DEFT(Method[DeftConfig]):
    """DEFT, NeurIPS 2025: ΔW = Q (s R - Zᵀ W₀); Q = P and Z = relu(P), or both are an orthonormal basis of P's
    columns.
    """

    prefix = "deft_"
    targets = LORA

    deft_P: nn.Parameter  # (out, r), r at most out
    deft_R: nn.Parameter  # (r, fan_in); PaRa has none
    deft_dropout: nn.Module
    scaling: float

    def describe(self) -> Effect:
        """Return an `Update` by `factors` that reads W₀ (`of_weight`)."""
        return Update(factors=self.factors, of_weight=True)

    def uses_weight(self) -> WeightUse:
        """Return `WeightUse.STARTS` if R starts from the weight: with `init_weights` and without `para`.

        Else `WeightUse.NONE`.
        """
        return WeightUse.STARTS if self.cfg.init_weights and not self.cfg.para else WeightUse.NONE

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return uninitialised `deft_P` (out, r) and, unless `para`, `deft_R` (r, fan_in), with r at most out;
        also r and scaling.

        scaling = alpha / r, or 1.0 for an alpha of 0 or None. Floating-point tensors are made on the default device, in
        the default dtype.
        """
        cfg, site = self.cfg, self.site
        r = min(cfg.r, site.out_features)
        P = nn.Parameter(torch.empty(site.out_features, r))
        values = dict(r=r, scaling=cfg.alpha / r if cfg.alpha else 1.0, deft_P=P)
        return values if cfg.para else values | dict(deft_R=nn.Parameter(torch.empty(r, site.fan_in)))

    def init_values(self) -> None:
        """Fill P with normal values of std 0.02, and R with Zᵀ W₀ / scaling, so that ΔW = 0.

        With `para` there is no R. With `init_weights=False` R is normal with std 0.02 · `init_scale`.
        """
        cfg = self.cfg
        nn.init.normal_(self.deft_P, std=0.02)
        if cfg.para:
            return
        if not cfg.init_weights:
            nn.init.normal_(self.deft_R, std=0.02 * cfg.init_scale)
            return
        with torch.no_grad():
            _, Z = self.projections()
            self.deft_R.copy_(multiply_widened(Z.T, self.W0) / self.scaling)

    @property
    def W0(self) -> Tensor:
        """The base weight (out, fan_in) without adapters and gradient."""
        return self.layer.W0.detach().flatten(1)

    def projections(self) -> tuple[Tensor, Tensor]:
        """Return Q and Z (out, r), in at least float32: P and relu(P) for "relu"; else both are the orthonormal Q of
        P's QR decomposition.
        """
        P = self.deft_P.to(torch.promote_types(self.deft_P.dtype, torch.float32))
        if self.cfg.decomposition_method == "relu":
            return P, P.relu()
        Q = torch.linalg.qr(P).Q
        return Q, Q

    def factors(self) -> Factors:
        """Return A = s R - Zᵀ W₀ and B = Q (`projections`; s the scaling), in the adapter's dtype, with its dropout.

        With `para` A = -Zᵀ W₀, without dropout.

        In training with dropout, A is a product that drops inputs of R alone. An embedding, or a convolution with
        groups, has no such product: there the dropout acts on both parts.
        """
        Q, Z = self.projections()
        A0, B = -multiply_widened(Z.T, self.W0).to(self.dtype), Q.to(self.dtype)
        if self.cfg.para:
            return Factors(A0, B)
        R, op = self.scaling * self.deft_R, self.site.op
        drops = self.cfg.deft_dropout > 0 and self.layer.training and not op.takes_ids
        if drops and op.factorable(self.site.module):
            return Factors(Product(partial(self.down, R, A0), R + A0), B)
        return Factors(R + A0, B, dropout=self.deft_dropout)  # acts on both where groups tear the two apart

    def down(self, R: Tensor, A0: Tensor, x: Tensor) -> Tensor:
        """Return R dropout(x) + A0 x: dropout acts on the input of R alone.

        A0 is -Zᵀ W₀. x is cast to the adapter's dtype.
        """
        op, base, x = self.site.op, self.layer.base_layer, x.to(self.dtype)
        return op.down(base, self.deft_dropout(x), R) + op.down(base, x, A0)
