# SPDX-License-Identifier: Apache-2.0
"""The serving room: many LoRA adapters on one model in fixed buffers, any mix in one batch, and new versions of them.

Entry points: `AdapterSlots`, `Versions` for a server that answers while a policy trains, and `graft.hotswap_adapter`.

- `slots.py`: `AdapterSlots`, with a hundred adapters on the device and a thousand in host memory.
- `hotswap.py`: new values for an adapter of a compiled model.
- `versions.py`: versions of an adapter on a running server.
"""

from graft.serving.slots import AdapterSlots, SlotReport
from graft.serving.versions import Versions

__all__ = ["AdapterSlots", "SlotReport", "Versions"]
