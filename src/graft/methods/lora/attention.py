# SPDX-License-Identifier: Apache-2.0
"""Files of adapters on the output projection of an nn.MultiheadAttention that is a target itself.

PEFT adds that projection's update twice, in training, inference and merging. So a file's B stands for twice its values.
graft keeps the update as the config says it in memory, and halves and doubles B on the way: either library computes the
same from a file of the other. Multiplying by a power of two rounds nothing.
"""

from __future__ import annotations

from graft.core.method import Tensors

B = ("lora_B", "weight")


def to_file(values: Tensors) -> Tensors:
    return {place: t / 2 if place == B else t for place, t in values.items()}


def from_file(stored: Tensors) -> Tensors:
    return {place: t * 2 if place == B else t for place, t in stored.items()}
