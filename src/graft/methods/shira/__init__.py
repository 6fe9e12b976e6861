# SPDX-License-Identifier: Apache-2.0
"""SHiRA: its config and maths, and the places that it trains."""

from graft.methods.shira.config import ShiraConfig
from graft.methods.shira.shira import SHiRA

__all__ = ["SHiRA", "ShiraConfig"]
