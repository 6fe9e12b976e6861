# SPDX-License-Identifier: Apache-2.0
"""What AdaLoRA's model class offers beside the methods of every tuner."""

from __future__ import annotations

from typing import Any

from graft.methods.adalora.allocator import trainable, update_and_allocate
from graft.methods.adalora.resizing import resize_modules_by_rank_pattern

API: dict[str, Any] = {
    "update_and_allocate": update_and_allocate,
    "resize_modules_by_rank_pattern": resize_modules_by_rank_pattern,
    "trainable_adapter_name": property(lambda tuner: (trainable(tuner) or (None,))[0]),
}
