# SPDX-License-Identifier: Apache-2.0
"""What a training script needs around adapters."""

from graft.train.adalora import adalora_callback, allocate_on_step

__all__ = ["adalora_callback", "allocate_on_step"]
