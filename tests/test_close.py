# SPDX-License-Identifier: Apache-2.0
"""The quick `assert_close` of tests/conftest.py passes and fails as torch's own, which it wraps."""

import itertools

import pytest
import torch

LISTS = [[1.0, 2], [1, 2.1], [1, torch.inf], [1, torch.nan], [], [[1, 2]]]
DTYPES = [torch.float32, torch.bfloat16, torch.complex64]
TENSORS = [torch.tensor(values, dtype=dtype) for values in LISTS for dtype in DTYPES]
OTHERS = [
    torch.nn.Parameter(torch.tensor([1.0, 2])), torch.tensor([1, 2]), torch.tensor([1.0, 2]).to_sparse(),
    torch.empty(2, device="meta"), torch.tensor([True, False]), 1.0, [1.0, 2.0], None,
]  # fmt: skip
OPTIONS = [{}, {"rtol": 0, "atol": 0}, {"rtol": 1e-5, "atol": 1e-5}, {"atol": 1.0}]
OPTIONS += [{"rtol": 0, "atol": 0.2, "check_dtype": False}, {"rtol": 0, "atol": 0, "equal_nan": True}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_passes_and_fails_as_torchs_own(options):
    def outcome(assert_close, pair):
        try:
            assert_close(*pair, **options)
        except Exception as error:
            return type(error), str(error)

    quick = torch.testing.assert_close
    for pair in itertools.product(TENSORS + OTHERS, repeat=2):
        assert outcome(quick, pair) == outcome(quick.__wrapped__, pair), pair
