# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA: its config and maths, and the allocator that moves rank between layers."""

from graft.methods.adalora.adalora import AdaLoRA, AdaLoraConfig

__all__ = ["AdaLoRA", "AdaLoraConfig"]
