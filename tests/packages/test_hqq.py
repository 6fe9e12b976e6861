# SPDX-License-Identifier: Apache-2.0
"""HQQ: the matrix of methods and bit widths."""

import copy

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

from tests.storage.cells import Kind, cells


def by(nbits, dtype=torch.float32, **options):
    def hold(layer):
        config = BaseQuantizeConfig(nbits=nbits, **options)
        return HQQLinear(copy.deepcopy(layer), config, compute_dtype=dtype, device="cpu")

    return hold


KINDS = [
    Kind("hqq4", by(4, group_size=64, axis=1)),
    Kind("hqq3-axis0", by(3, group_size=64, axis=0)),
]

tests = cells(KINDS)
test_reading, test_forward_and_gradients, test_merging, test_merging_into_a_dense_layer, test_files = tests
