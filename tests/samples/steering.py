# SPDX-License-Identifier: Apache-2.0
"""Samples of steering vectors."""

from graft.core.errors import UnsupportedLayerError
from tests.samples.laws import Sample

LAWS = [
    Sample("STEERING", config=dict(coefficient=1.5)),
    Sample("STEERING", "normalized", dict(coefficient=2.0, normalize=True)),
]
REFUSED = [("STEERING", "conv", UnsupportedLayerError, "is added to vectors")]
UNMERGEABLE = [("STEERING", "", NotImplementedError, "it changes activations")]
