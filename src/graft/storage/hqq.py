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
        return m.dequantize()

    def packed(self, m: nn.Module, W: Tensor) -> dict[str, object]:
        config = {**m.quant_config, "offload_meta": m.offload_meta}
        made = type(m)(None, config, compute_dtype=m.compute_dtype, device=str(m.W_q.device))
        made.quantize(W, **made.quant_config)
        return {"W_q": made.W_q, "meta": made.meta}

    def compute_dtype(self, m: nn.Module) -> torch.dtype:
        return m.compute_dtype

    def unreadable(self, m: nn.Module) -> str | None:
        return None if m.ready else "it is not quantized yet"

    def ready(self, m: nn.Module) -> None:
        """Freeze a bias that is no Parameter: HQQ takes it from the old layer together with its graph."""
        if isinstance(m.__dict__.get("bias"), Tensor):
            m.bias = m.bias.detach()


MODULES = {"hqq.core.quantize.HQQLinear": HQQ()}
