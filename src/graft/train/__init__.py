# SPDX-License-Identifier: Apache-2.0
"""Helpers for training scripts."""

from graft.train.adalora import adalora_callback, allocate_on_step
from graft.train.monteclora import MontecloraTrainerMixin

__all__ = ["MontecloraTrainerMixin", "adalora_callback", "allocate_on_step"]
