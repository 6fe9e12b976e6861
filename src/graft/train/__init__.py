# SPDX-License-Identifier: Apache-2.0
"""Helpers for training scripts."""

from graft.train.callbacks import MontecloraTrainerMixin, adalora_callback, allocate_on_step
from graft.train.watch import Watch

__all__ = ["MontecloraTrainerMixin", "Watch", "adalora_callback", "allocate_on_step"]
