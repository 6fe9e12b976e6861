# SPDX-License-Identifier: Apache-2.0
"""graft in PEFT's place, as an installed package: see README.md beside this folder."""

import sys

sys.modules.pop("peft", None)  # graft, as it is imported, may ask for `peft`: this module is not it

from graft.compat.peft import stand_in  # noqa: E402

stand_in()
