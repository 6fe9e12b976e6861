# SPDX-License-Identifier: Apache-2.0
"""Samples of ReFT."""

from graft.core.errors import UnsupportedLayerError
from tests.samples.laws import Sample

LAWS = [
    Sample("REFT", config=dict(r=2, dropout=0.0), identity=False),
    Sample("REFT", "ends", dict(r=3, prefix_positions=1, suffix_positions=2, tied_weights=True, non_linearity="gelu",
                                dropout=0.0), identity=False),
    Sample("REFT", "noreft", dict(r=2, orthogonality=False, dropout=0.0), identity=False),
    Sample("REFT", "direft", dict(r=2, prefix_positions=0, suffix_positions=2, orthogonality=False,
                                  subtract_projection=False, dropout=0.0), identity=False),
]  # fmt: skip
REFUSED = [("REFT", "conv", UnsupportedLayerError, "acts on vectors")]
UNMERGEABLE = [("REFT", "", NotImplementedError, "it changes activations")]
