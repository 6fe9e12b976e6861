# SPDX-License-Identifier: Apache-2.0
"""graft in PEFT's place, for processes that find this folder on their path: see `graft.compat.peft.children`."""

import sys

sys.modules.pop("peft", None)  # graft, as it is imported, may ask for `peft`: this module is not it

from graft.compat.peft import stand_in  # noqa: E402

stand_in()
