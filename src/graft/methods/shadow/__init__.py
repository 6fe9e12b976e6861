# SPDX-License-Identifier: Apache-2.0
"""SHADOW: a small network next to the model; the blocks read and update its state."""

from graft.methods.shadow.network import ShadowConfig
from graft.methods.shadow.shadow import Shadow

__all__ = ["Shadow", "ShadowConfig"]
