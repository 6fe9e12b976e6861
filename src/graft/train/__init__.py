# SPDX-License-Identifier: Apache-2.0
"""What a training script needs around adapters."""

from graft.train.adalora import adalora_callback, allocate_on_step
from graft.train.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer

__all__ = [
    "adalora_callback",
    "allocate_on_step",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "create_riemannian_optimizer",
]
