# SPDX-License-Identifier: Apache-2.0
"""Functions of other rooms that PeftModel offers. Only this file of the library names a room; a test checks that."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

FUNCTIONS = {"export_adapters": "graft.files.export_model"}  # function → its module


def import_from_room(name: str) -> Callable[..., Any]:
    """Return the function `name` of another room, after importing its module by the table `FUNCTIONS`.

    KeyError for any name but "export_adapters".
    """
    function: Callable[..., Any] = getattr(import_module(FUNCTIONS[name]), name)
    return function
