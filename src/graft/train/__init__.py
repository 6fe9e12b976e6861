# SPDX-License-Identifier: Apache-2.0
"""Helpers for training scripts."""

from graft.train.adalora import adalora_callback, allocate_on_step

__all__ = ["adalora_callback", "allocate_on_step"]
