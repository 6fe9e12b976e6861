# SPDX-License-Identifier: Apache-2.0
"""BEFT: Bias-Efficient Fine-Tuning of Language Models in Low-Data Regimes, arXiv 2509.15974."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graft.config.fields import TARGETS, Targets
from graft.core.effect import Effect, Update
from graft.core.errors import PeftWarning, warn_of_layer
from graft.core.method import Method


@dataclass(kw_only=True)
class BeftConfig(Targets):
    """BEFT: a shift of each layer's output, y + c; by default of value projections."""

    peft_type: str = "BEFT"
    init_weights: bool = True  # zero; else N(0, 1)


class BEFT(Method[BeftConfig]):
    """BEFT, arXiv 2509.15974: y + c. An embedding has no bias: there c is an update of every row, ΔW = c 1ᵀ."""

    prefix = "beft_"
    targets = TARGETS["BEFT"]

    beft_bias: nn.Parameter  # (1, out)

    def describe(self) -> Effect:
        """Return an `Update` of the bias by `shift`, which cannot merge if the layer has no bias.

        On an embedding an `Update` by `delta` and `branch`.
        """
        if self.site.op.takes_ids:
            return Update(self.delta, branch=self.branch)
        has_bias = getattr(self.site.module, "bias", None) is not None
        return Update(bias=self.shift, why_unmergeable=None if has_bias else "Base layer has no bias to merge into")

    def build(self, shared: dict[str, object]) -> dict[str, object]:
        """Return `beft_bias` (1, out) with normal values.

        Warns if the layer has no bias, so that the adapter cannot merge. Floating-point tensors are made on the default
        device, in the default dtype.
        """
        if self.effect.why_unmergeable is not None:
            text = "Layer {} has no bias. Note you cannot merge the BEFT adapter into the base layer."
            warn_of_layer(self.site.key, text, PeftWarning)
        return dict(beft_bias=nn.Parameter(torch.randn(1, self.site.out_features)))

    def init_values(self) -> None:
        """Fill c with zeros; with `init_weights=False` keep the normal values."""
        if self.cfg.init_weights:
            nn.init.zeros_(self.beft_bias)

    def shift(self) -> Tensor:
        """Return the update c of the bias, (out,): `beft_bias` without its first dimension."""
        return self.beft_bias.flatten()

    def branch(self, x: Tensor) -> Tensor:
        """Return c (out,), scaled as the embedding scales its outputs (`op.scale_rows`).

        It is the same for all ids, so x is not read.
        """
        return self.site.op.scale_rows(self.layer.base_layer, self.shift())

    def delta(self) -> Tensor:
        """Return c as an update of every row of an embedding: expanded to the weight's shape."""
        return self.shift()[:, None].expand(self.site.shape)
