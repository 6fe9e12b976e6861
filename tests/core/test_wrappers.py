# SPDX-License-Identifier: Apache-2.0
"""Names without the parts that wrappers put into them."""

import pytest

from graft.core.wrappers import INNER, bare, clean


@pytest.mark.parametrize("part", INNER)
def test_names_lose_the_part_of_every_wrapper(part):
    for name in (f"{part}.a.b", f"a.{part}.b", f"a.{part}.{part}.b"):
        assert clean(name) == bare(name) == name.replace(f"{part}.", "")
    assert clean(f"my{part}.a") == f"my{part}.a"
