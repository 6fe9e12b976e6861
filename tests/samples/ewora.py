# SPDX-License-Identifier: Apache-2.0
"""Samples of EWoRA."""

from graft.core.errors import UnsupportedLayerError
from tests.samples.laws import Sample

LAWS = [
    Sample("EWORA", "", dict(r=3, num_experts=3), dict(r=2, num_experts=2)),
    Sample("EWORA", "random", dict(r=2, num_experts=4, init_weights=False), identity=False),
]
REFUSED = [
    ("EWORA", "conv", UnsupportedLayerError, "linear layers only"),
    ("EWORA", "embedding", UnsupportedLayerError, "linear layers only"),
]
UNMERGEABLE = [("EWORA", "", NotImplementedError, "dynamically weighted")]
