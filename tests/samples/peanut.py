# SPDX-License-Identifier: Apache-2.0
"""Samples of PEANuT."""

from tests.samples.laws import Sample
from tests.samples.parity import CHOICE, DEFAULT_TARGETS, EXCLUDE, LAYERS, row

LAWS = [
    Sample("PEANUT", config=dict(r=3, act_fn="tanh"), subtracts=True),
    Sample("PEANUT", "deep", dict(r=3, depth=2, act_fn="gelu", scaling=1.37), subtracts=True),
]
PARITY = [
    *row("plain", "mlp llama t5 bert", r=4),
    *row("default_targets", "llama opt bert", r=4, **DEFAULT_TARGETS),
    *row("deep", "mlp llama", r=4, depth=2, scaling=1.37),
    *row("act_fn", "mlp", r=4, depth=1, act_fn="quick_gelu"),
    *row("random", "mlp llama", r=4, depth=1, init_weights=False),
    *LAYERS,
    *CHOICE,
    *EXCLUDE,
]
