# SPDX-License-Identifier: Apache-2.0
"""Products with matrices of a structure that saves work: as with the whole matrix."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from graft.kernels import blocks
from tests.models import seeded


@pytest.mark.parametrize("k", [1, 2, 3])
def test_factors_of_blocks(k):
    with seeded(0):
        A, B, x = torch.randn(k, 5, 2 * k), torch.randn(k, 2 * k, 4), torch.randn(2, 3, 5 * k)
        general = nn.Linear(5 * k, 3, bias=False), nn.Linear(3, 4 * k, bias=False)
    down, up = blocks.Inputs(A), blocks.Outputs(B)
    close = dict(rtol=1e-5, atol=1e-5)
    assert_close(up(down(x)), blocks.plain(x, A, B), **close)
    assert_close(x @ (up.weight @ down.weight).T, up(down(x)), **close)
    down, up = blocks.Inputs(A, general[0]), blocks.Outputs(B, general[1])
    assert_close(up(down(x)), blocks.plain(x, A, B) + general[1](general[0](x)), **close)
    assert_close(x @ (up.weight @ down.weight).T, up(down(x)), **close)
