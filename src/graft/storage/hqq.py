# SPDX-License-Identifier: Apache-2.0
"""The store of HQQ's layers: codes, with scale and zero point of each group in a dict. There is no `weight`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graft.storage.quantized import Quantized


class HQQ(Quantized):
    name = "hqq"
    parts = ("W_q", "meta")

    def values(self, m: nn.Module) -> Tensor:
        """Return the weight (out, in), dequantized by the module in its compute dtype."""
        return m.dequantize()

    def pack(self, m: nn.Module, W: Tensor) -> dict[str, object]:
        """Return codes `W_q` and their `meta` for W, from a new HQQ layer with the settings and device of the old one.

        The old layer does not change.
        """
        config = {**m.quant_config, "offload_meta": m.offload_meta}
        layer = type(m)(None, config, compute_dtype=m.compute_dtype, device=str(m.W_q.device))
        layer.quantize(W, **layer.quant_config)
        return {"W_q": layer.W_q, "meta": layer.meta}

    def compute_dtype(self, m: nn.Module) -> torch.dtype:
        """Return the module's `compute_dtype`."""
        return m.compute_dtype

    def why_undecodable(self, m: nn.Module) -> str | None:
        """Return "it is not quantized yet" if the module's `ready` is false; None otherwise."""
        return None if m.ready else "it is not quantized yet"

    def ready(self, m: nn.Module) -> None:
        """Replace a bias that is no Parameter by a detached tensor: HQQ keeps the old layer's bias with its graph.

        Returns None: there is no warning.
        """
        if isinstance(m.__dict__.get("bias"), Tensor):
            m.bias = m.bias.detach()


MODULES = {"hqq.core.quantize.HQQLinear": HQQ()}
