# SPDX-License-Identifier: Apache-2.0
"""Names without the parts that wrappers put into them."""

import pytest

from graft.core.wrappers import INNER_ATTRIBUTES, strip_all_wrappers, strip_inner_wrappers


@pytest.mark.parametrize("part", INNER_ATTRIBUTES)
def test_names_lose_the_part_of_every_wrapper(part):
    for name in (f"{part}.a.b", f"a.{part}.b", f"a.{part}.{part}.b"):
        assert strip_inner_wrappers(name) == strip_all_wrappers(name) == name.replace(f"{part}.", "")
    assert strip_inner_wrappers(f"my{part}.a") == f"my{part}.a"
