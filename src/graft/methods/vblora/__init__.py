# SPDX-License-Identifier: Apache-2.0
"""VB-LoRA: its config and maths, and how much its files hold."""

from graft.methods.vblora.config import VBLoRAConfig
from graft.methods.vblora.vblora import VBLoRA

__all__ = ["VBLoRA", "VBLoRAConfig"]
