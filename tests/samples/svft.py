# SPDX-License-Identifier: Apache-2.0
"""Samples of SVFT."""

from tests.samples.laws import Sample

LAWS = [
    Sample("SVFT", subtracts=True),
    Sample("SVFT", "banded", dict(off_diag=1, r=3, save_projection=True), subtracts=True),
    Sample("SVFT", "random", dict(off_diag=1, pattern="random", init_weights=False), identity=False, subtracts=True),
]
