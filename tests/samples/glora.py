# SPDX-License-Identifier: Apache-2.0
"""Samples of GLoRA."""

from tests.samples.laws import Sample
from tests.samples.parity import CHOICE, DEFAULT_TARGETS, row

LAWS = [
    Sample("GLORA", config=dict(r=3)),
    Sample("GLORA", "vector", dict(config_A_B="vector", config_C="vector", config_D_E="vector")),
]
PARITY = [
    *row("plain", "mlp llama t5 bert", r=3),
    *row("default_targets", "llama opt bert", r=3, **DEFAULT_TARGETS),
    *row("vector", "mlp llama", config_A_B="vector", config_C="vector", config_D_E="vector"),
    *row("constant", "mlp llama", config_A_B="constant", config_C="none", config_D_E="none"),
    *row("biases", "mlp", config_A_B="none"),
    *row("random", "mlp llama", r=3, init_weights=False),
    *row("random_vector", "mlp", config_A_B="vector", config_C="vector", config_D_E="vector", init_weights=False),
    *row("random_constant", "mlp", config_A_B="constant", config_C="none", init_weights=False),
    *row("bias_all", "mlp", r=3, bias="all"),
    *row("bias_glora_only", "bert", r=3, bias="glora_only"),
    *CHOICE,
]
