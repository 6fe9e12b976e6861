# SPDX-License-Identifier: Apache-2.0
"""quanto: the matrix of methods and bit widths."""

import copy

from optimum.quanto import qint4, qint8
from optimum.quanto.nn import QLinear

from tests.storage.cells import Kind, cells


def by(weights):
    def hold(layer):
        made = QLinear.from_module(copy.deepcopy(layer), weights=weights)
        made.freeze()
        return made.requires_grad_(False)

    return hold


KINDS = [Kind("int8", by(qint8)), Kind("int4", by(qint4))]

tests = cells(KINDS)
test_reading, test_forward_and_gradients, test_merging, test_merging_into_a_dense_layer, test_files = tests
