# SPDX-License-Identifier: Apache-2.0
"""Samples of FineGates."""

from graft.core.errors import UnsupportedLayerError
from tests.samples.laws import Sample

LAWS = [
    Sample("FINEGATES", config=dict(gate_init_mean=0.549306, gate_init_std=0.0), identity=1e-5),  # all just open
    Sample("FINEGATES", "partly", dict(gate_init_mean=0.3), identity=False),
    Sample("FINEGATES", "noise", dict(gate_noise_std=0.1, gate_init_mean=0.2), identity=False, draws=True),
]
REFUSED = [("FINEGATES", "embedding", UnsupportedLayerError, "those of an embedding are ids")]
