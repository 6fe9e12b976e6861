# SPDX-License-Identifier: Apache-2.0
"""VB-LoRA: its config and maths, and the size of its files."""

from graft.methods.vblora.config import VBLoRAConfig
from graft.methods.vblora.vblora import VBLoRA

__all__ = ["VBLoRA", "VBLoRAConfig"]
