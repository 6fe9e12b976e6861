# SPDX-License-Identifier: Apache-2.0
"""Poly: skills mixed by task."""

from graft.methods.poly.config import PolyConfig
from graft.methods.poly.poly import Poly

__all__ = ["Poly", "PolyConfig"]
