# SPDX-License-Identifier: Apache-2.0
"""The public surface is the one that tests/surface.txt holds."""

import difflib

from tests.surface import FILE, print_surface


def test_the_public_surface_is_the_recorded_one():
    recorded, surface = FILE.read_text().splitlines(), print_surface().splitlines()
    changes = list(difflib.unified_diff(recorded, surface, "tests/surface.txt", "today", lineterm="", n=0))
    assert not changes, "\n".join(["if meant, run python -m tests.surface and commit the file", *changes[:40]])
