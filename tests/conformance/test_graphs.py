# SPDX-License-Identifier: Apache-2.0
"""Every method runs the kernels and casts that it ran, where it ran them."""

import pytest

from tests.conformance import graphs

REMEDY = f"If that is meant, write the file anew: python -m {graphs.__name__}."


@pytest.mark.parametrize("layer", graphs.LAYERS)
def test_kernels_and_casts_are_those_of_the_file(layer):
    first, *was = graphs.FILE.read_text().splitlines()
    if first != graphs.TORCH:
        pytest.skip(f"the file has the names of torch {first}")
    names = [name for name in graphs.CELLS_BY_NAME if name.endswith(f" {layer}")]
    now = [line for name in names for line in graphs.lines_of(name)]
    was = [line for line in was if line.split()[1] == layer]
    assert sorted(now) == sorted(was), REMEDY
