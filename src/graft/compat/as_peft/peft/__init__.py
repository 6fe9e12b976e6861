# SPDX-License-Identifier: Apache-2.0
"""graft in PEFT's place, for processes that find this folder on their path: see `graft.compat.peft.children`."""

STAND_IN = True  # set before the import: graft tells this module from PEFT by it

from graft.compat.peft import stand_in  # noqa: E402

stand_in()
