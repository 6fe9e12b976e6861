# SPDX-License-Identifier: Apache-2.0
"""X-LoRA: a mixture of LoRA experts."""

from graft.methods.xlora.config import XLoraConfig
from graft.methods.xlora.xlora import XLora

__all__ = ["XLora", "XLoraConfig"]
