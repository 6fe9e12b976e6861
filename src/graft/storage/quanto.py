# SPDX-License-Identifier: Apache-2.0
"""The store of quanto's linear layers, frozen or not: the module quantizes a weight that is not packed at each call."""

from __future__ import annotations

from torch import Tensor, nn

from graft.storage.quantized import Quantized, copy_with


class Quanto(Quantized):
    """The store of quanto's linear layers, frozen or not."""

    name = "quanto"
    copies = "views"  # which quanto's Function returns
    typed = "weight"

    def values(self, m: nn.Module) -> Tensor:
        """Return the dequantized weight (out, in) of the module's `qweight`: the packed one, or one that it quantizes
        now.
        """
        return m.qweight.dequantize()

    def pack(self, m: nn.Module, W: Tensor) -> dict[str, object]:
        """Return W quantized with the module's settings, as the parameter `weight` with the old requires_grad.

        In a module that is not frozen the parameter is W itself, as the module quantizes at each call.
        """
        if not m.frozen:
            return {"weight": nn.Parameter(W, m.weight.requires_grad)}
        new = copy_with(m, {"weight": nn.Parameter(W, requires_grad=False)})
        return {"weight": nn.Parameter(new.qweight, requires_grad=m.weight.requires_grad)}

    def why_undecodable(self, m: nn.Module) -> str | None:
        """Return "it has no quantized weight" if the module quantizes only activations; None otherwise."""
        return "it has no quantized weight" if m.weight_qtype is None else None


MODULES = {"optimum.quanto.nn.qlinear.QLinear": Quanto()}
