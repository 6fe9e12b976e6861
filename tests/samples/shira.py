# SPDX-License-Identifier: Apache-2.0
"""Samples of SHiRA."""

from tests.samples.laws import Sample
from tests.samples.parity import CHOICE, DEFAULT_TARGETS, row, sized

LAWS = [Sample("SHIRA", config=dict(r=1))]
PARITY = [
    *row("plain", "mlp llama t5", r=1),
    *row("default_targets", "llama opt bert", r=3, **DEFAULT_TARGETS),
    *row("seeded", "mlp", r=3, random_seed=42),
    *row("random", "mlp", r=3, init_weights=False),
    *sized(CHOICE, r=2),
]
