# SPDX-License-Identifier: Apache-2.0
"""Many LoRA adapters on one model: a hundred in fixed buffers, a thousand in host memory, any mix in one batch."""

from graft.serving.slots import AdapterSlots, SlotReport
from graft.serving.versions import Versions

__all__ = ["AdapterSlots", "SlotReport", "Versions"]
