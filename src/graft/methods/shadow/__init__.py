# SPDX-License-Identifier: Apache-2.0
"""SHADOW: a small network beside the model, whose state the blocks read and update."""

from graft.methods.shadow.network import ShadowConfig
from graft.methods.shadow.shadow import Shadow

__all__ = ["Shadow", "ShadowConfig"]
