# SPDX-License-Identifier: Apache-2.0
"""Helpers for training scripts."""

from graft.train.callbacks import (
    FineGatesTrainerMixin,
    MontecloraTrainerMixin,
    Watch,
    adalora_callback,
    allocate_on_step,
)
from graft.train.checkpoints import last_checkpoint
from graft.train.restart import restart
from graft.train.resumable import Resumable

__all__ = [
    "FineGatesTrainerMixin",
    "MontecloraTrainerMixin",
    "Resumable",
    "Watch",
    "adalora_callback",
    "allocate_on_step",
    "last_checkpoint",
    "restart",
]
