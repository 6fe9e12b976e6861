# SPDX-License-Identifier: Apache-2.0
"""Functions of other rooms that PeftModel offers: the only place where the library names a room (a test holds it)."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

FUNCTIONS = {"export_adapters": "graft.files.export_model"}  # function → its module


def import_from_room(name: str) -> Callable[..., Any]:
    """Import the module of a room's function when PeftModel needs it, and return the function."""
    function: Callable[..., Any] = getattr(import_module(FUNCTIONS[name]), name)
    return function
