# SPDX-License-Identifier: Apache-2.0
"""Samples of PSOFT."""

from tests.samples.laws import Sample
from tests.samples.parity import CHOICE, DEFAULT_TARGETS, EXCLUDE, LAYERS, row, sized

LAWS = [
    Sample("PSOFT", config=dict(r=3, psoft_alpha=4), subtracts=True),
    Sample("PSOFT", "free", dict(r=2, psoft_alpha=3, psoft_orth=False, ab_svd_init="pissa_init"), subtracts=True),
]
PARITY = [
    *row("plain", "mlp llama t5", r=4, psoft_alpha=5),
    *row("default_targets", "llama opt", r=4, **DEFAULT_TARGETS),
    *row("pissa", "mlp", r=4, psoft_alpha=5, ab_svd_init="pissa_init"),
    *row("lowrank", "mlp llama", r=4, psoft_alpha=5, psoft_svd="lowrank", random_seed=3),
    *row("free", "mlp", r=4, psoft_alpha=5, psoft_orth=False),
    *row("no_b", "mlp", r=4, psoft_mag_b=False),
    *row("no_a", "mlp", r=4, psoft_mag_a=False),
    *row("series", "mlp", r=4, psoft_alpha=5, use_cayley_neumann=True),
    *row("series_eps", "mlp", r=4, use_cayley_neumann=True, num_cayley_neumann_terms=6, cayley_neumann_eps=0.7),
    *row("dropout", "mlp", r=4, psoft_dropout=0.3),
    *row("random", "mlp", r=4, init_weights=False),
    *row("random_free", "mlp", r=4, init_weights=False, psoft_orth=False),
    *sized([*LAYERS, *CHOICE, *EXCLUDE], r=3),
]
