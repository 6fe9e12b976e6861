# SPDX-License-Identifier: Apache-2.0
"""Samples of FRoD."""

from tests.samples.laws import Sample
from tests.samples.parity import CHOICE, DEFAULT_TARGETS, LAYERS, row, sized

LAWS = [Sample("FROD", config=dict(sparse_rate=0.1))]
PARITY = [
    *row("plain", "mlp conv1D llama gpt2 t5", sparse_rate=0.1),
    *row("default_targets", "llama gpt2", **DEFAULT_TARGETS),
    *row("key", "mlp", sparse_rate=0.1, projection_prng_key=3),
    *row("unsaved", "mlp llama", sparse_rate=0.1, save_projection=False),
    *row("alpha", "mlp", sparse_rate=0.1, regularization_alpha=0.3),
    *row("dense", "mlp", sparse_rate=1.0),
    *row("dropout", "mlp conv1D", sparse_rate=0.1, frod_dropout=0.3),
    *row("random", "mlp", sparse_rate=0.1, init_weights=False),
    *row("bias_all", "mlp", sparse_rate=0.1, bias="all"),
    *row("bias_frod_only", "bert", sparse_rate=0.1, bias="frod_only"),
    *row("fan_in_fan_out", "gpt2", sparse_rate=0.1, fan_in_fan_out=True),
    *sized([*LAYERS, *CHOICE], sparse_rate=0.1),
]
