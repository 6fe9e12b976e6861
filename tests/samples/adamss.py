# SPDX-License-Identifier: Apache-2.0
"""Samples of AdaMSS."""

from tests.samples.laws import Sample
from tests.samples.parity import CHOICE, DEFAULT_TARGETS, LAYERS, row, sized

LAWS = [Sample("ADAMSS", config=dict(r=5, num_subspaces=3), subtracts=True, reads=True)]
PARITY = [
    *row("plain", "mlp llama t5 bert", r=7, num_subspaces=3, subspace_rank=2),
    *row("default_targets", "llama bert", **DEFAULT_TARGETS),
    *row("dynamic", "mlp llama", r=7, subspace_rank=3, use_dynamic_rank=True, svd_threshold=0.3),
    *row("random", "mlp", r=7, init_weights=None),
    *row("seed", "mlp", r=7, random_seed=5),
    *row("many", "mlp", r=7, num_subspaces=100),
    *sized([*LAYERS, *CHOICE], r=7, num_subspaces=3),
]
