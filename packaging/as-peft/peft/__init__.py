# SPDX-License-Identifier: Apache-2.0
"""graft in PEFT's place, as an installed package: see README.md beside this folder."""

STAND_IN = True  # before the import, by which graft knows this module from PEFT

from graft.compat.peft import stand_in  # noqa: E402

stand_in()
