# SPDX-License-Identifier: Apache-2.0
"""Samples of MiSS."""

from graft.core.errors import UnsupportedLayerError
from tests.samples.laws import Sample
from tests.samples.parity import CHOICE, DEFAULT_TARGETS, EXCLUDE, LAYERS, row, sized

LAWS = [
    Sample("MISS", config=dict(r=4), subtracts=True),
    Sample("MISS", "mini", dict(r=4, mini_r=2, init_weights="mini"), subtracts=True),
    Sample("MISS", "bat", dict(r=2, init_weights="bat")),
]
REFUSED = [
    ("MISS-bat", "odd-in", UnsupportedLayerError, "must be divisible by"),
    ("MISS-bat MISS-mini", "odd-out", UnsupportedLayerError, "must be divisible by"),
]
PARITY = [
    *row("plain", "mlp llama t5 bert-qa", r=4),
    *row("default_targets", "llama opt t5", r=4, **DEFAULT_TARGETS),
    *row("uneven", "mlp llama", r=7),
    *row("mini", "mlp llama", r=4, mini_r=3, target_modules=["fc2", "v_proj"], init_weights="mini"),
    *row("mini_1", "mlp", r=5, init_weights="mini"),
    *row("bat", "mlp llama t5", r=2, init_weights="bat"),
    *row("dropout", "mlp llama", r=2, miss_dropout=0.3),
    *row("random", "mlp llama", r=4, init_weights=False),
    *row("bias_all", "mlp", r=4, bias="all"),
    *row("bias_miss_only", "bert", r=4, bias="MiSS_only"),
    *sized([*LAYERS, *CHOICE, *EXCLUDE], r=4),
]
