# SPDX-License-Identifier: Apache-2.0
"""FRoD: its config and maths, and what layers share."""

from graft.methods.frod.config import FrodConfig
from graft.methods.frod.frod import FRoD

__all__ = ["FRoD", "FrodConfig"]
