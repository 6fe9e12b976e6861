# SPDX-License-Identifier: Apache-2.0
"""The stores of bitsandbytes' embeddings, which pack a table as its linear layers pack a weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from graft.core.ops import Embedding
from graft.storage.bnb import Eight, Four
from graft.storage.dense import Dense
from graft.storage.quantized import Quantized


class Table(Quantized):
    def dense(self, m: Any, dtype: torch.dtype | None = None) -> nn.Embedding:  # type: ignore[override]
        """Return a plain embedding that holds the same values."""
        W = self.read(m)
        options = (m.padding_idx, m.max_norm, m.norm_type, m.scale_grad_by_freq, m.sparse)
        return nn.Embedding.from_pretrained(W.to(dtype or m.dtype), True, *options).train(m.training)


class Table4(Table, Four):
    pass


class Table8(Table, Eight):
    pass


MODULES: dict[str, Dense] = {
    "bitsandbytes.nn.modules.Embedding4bit": Table4(),
    "bitsandbytes.nn.modules.Embedding8bit": Table8(),
    "bitsandbytes.nn.modules.Embedding": Dense(),  # writes out what nn.Embedding does
}
OPS = dict.fromkeys(MODULES, Embedding())
