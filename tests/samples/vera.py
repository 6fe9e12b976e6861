# SPDX-License-Identifier: Apache-2.0
"""Samples of VeRA."""

from tests.samples.laws import Sample
from tests.samples.parity import CHOICE, DEFAULT_TARGETS, LAYERS, row

LAWS = [Sample("VERA", config=dict(r=3), subtracts=True)]
PARITY = [
    *row("plain", "mlp conv1D llama gpt2 t5", r=5),
    *row("default_targets", "llama gpt2 bert", r=5, **DEFAULT_TARGETS),
    *row("key", "mlp llama", r=5, projection_prng_key=3),
    *row("unsaved", "mlp llama", r=5, save_projection=False),
    *row("dropout", "mlp conv1D", r=5, vera_dropout=0.3),
    *row("d_initial", "mlp", r=5, d_initial=0.37),
    *row("random", "mlp", r=5, init_weights=False),
    *row("bias_all", "mlp", r=5, bias="all"),
    *row("bias_vera_only", "bert", r=5, bias="vera_only"),
    *row("fan_in_fan_out", "gpt2", r=5, fan_in_fan_out=True),
    *LAYERS,
    *CHOICE,
]
