# SPDX-License-Identifier: Apache-2.0
"""Samples of RandLoRA."""

from tests.samples.laws import Sample
from tests.samples.parity import CHOICE, DEFAULT_TARGETS, LAYERS, row, sized

LAWS = [Sample("RANDLORA", config=dict(r=3, randlora_alpha=4), subtracts=True)]
PARITY = sized(
    [
        *row("plain", "mlp conv1D llama gpt2 t5"),
        *row("default_targets", "llama gpt2", **DEFAULT_TARGETS),
        *row("key", "mlp", projection_prng_key=3),
        *row("unsaved", "mlp llama", save_projection=False),
        *row("sparse", "mlp", sparse=True),
        *row("very_sparse", "mlp conv1D", sparse=True, very_sparse=True),
        *row("dropout", "mlp conv1D", randlora_dropout=0.3),
        *row("random", "mlp", init_weights=False),
        *row("bias_all", "mlp", bias="all"),
        *row("bias_randlora_only", "bert", bias="randlora_only"),
        *row("fan_in_fan_out", "gpt2", fan_in_fan_out=True),
        *LAYERS,
        *CHOICE,
    ],
    r=5,
    randlora_alpha=7,
)
