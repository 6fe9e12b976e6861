# SPDX-License-Identifier: Apache-2.0
"""The config of VB-LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from graft.config.fields import LayerRange, Targeted, require_positive_rank
from graft.core.errors import ConfigError


@dataclass(kw_only=True)
class VBLoRAConfig(Targeted, LayerRange):
    """VB-LoRA: ΔW = B A, whose numbers are mixtures of a few vectors from a bank that all layers share."""

    peft_type: Any = "VBLORA"
    r: int = 4
    num_vectors: int = 256  # in the bank
    vector_length: int = 256  # must divide the widths of all layers
    topk: int = 2  # how many vectors a mixture has
    save_only_topk_weights: bool = False  # small files, from which training cannot go on
    vblora_dropout: float = 0.0
    fan_in_fan_out: bool = False  # the layers store (in, out); corrected by layer type
    bias: str = "none"  # which base biases train: none, all, vblora_only
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_rank(self.r)
        for name in ("topk", "num_vectors", "vector_length"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"`{name}` {getattr(self, name)} should be a positive integer value")
        if self.topk > self.num_vectors:
            raise ConfigError(f"`topk` {self.topk} is more than `num_vectors` {self.num_vectors}")

    @property
    def index_type(self) -> torch.dtype:
        """The smallest integer type that counts the vectors, for files."""
        sizes = ((2**8, torch.uint8), (2**15, torch.int16), (2**31, torch.int32))
        return next((dtype for most, dtype in sizes if self.num_vectors < most), torch.int64)
