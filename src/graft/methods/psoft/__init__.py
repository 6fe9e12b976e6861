# SPDX-License-Identifier: Apache-2.0
"""PSOFT: its config and maths."""

from graft.methods.psoft.config import PsoftConfig
from graft.methods.psoft.psoft import PSOFT

__all__ = ["PSOFT", "PsoftConfig"]
