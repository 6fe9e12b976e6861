# SPDX-License-Identifier: Apache-2.0
"""The public surface is the one that tests/surface.txt holds."""

import difflib

import peft

from graft.methods import ROWS
from tests.surface import FILE, print_surface


def test_the_public_surface_is_the_recorded_one():
    recorded, surface = FILE.read_text().splitlines(), print_surface().splitlines()
    changes = list(difflib.unified_diff(recorded, surface, "tests/surface.txt", "today", lineterm="", n=0))
    assert not changes, "\n".join(["if meant, run python -m tests.surface and commit the file", *changes[:40]])


def test_methods_are_marked_as_peft_has_them():
    for name, row in ROWS.items():
        assert row.in_peft == hasattr(peft, row.config), name
        assert row.in_peft == (name in peft.PeftType.__members__), name
