# SPDX-License-Identifier: Apache-2.0
"""The store of quanto's linear layers, frozen or not: the module quantizes a weight that is not packed at each call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graft.storage.quantized import Quantized, copy_with


class Quanto(Quantized):
    name = "quanto"

    def values(self, m: nn.Module) -> Tensor:
        return m.qweight.dequantize()

    def pack(self, m: nn.Module, W: Tensor) -> dict[str, object]:
        if not m.frozen:
            return {"weight": nn.Parameter(W, m.weight.requires_grad)}
        new = copy_with(m, {"weight": nn.Parameter(W, requires_grad=False)})
        return {"weight": nn.Parameter(new.qweight, requires_grad=m.weight.requires_grad)}

    def compute_dtype(self, m: nn.Module) -> torch.dtype:
        return m.weight.dtype

    def why_undecodable(self, m: nn.Module) -> str | None:
        return "it has no quantized weight" if m.weight_qtype is None else None

    def protect(self, y: Tensor) -> Tensor:
        """Return a copy if the output is a view: quanto's Function returns views, which forbid writing."""
        return y.clone() if y._is_view() else y


MODULES = {"optimum.quanto.nn.qlinear.QLinear": Quanto()}
