# SPDX-License-Identifier: Apache-2.0
"""Samples of Uni-LoRA."""

from tests.samples.laws import Sample
from tests.samples.parity import CHOICE, DEFAULT_TARGETS, LAYERS, row, sized

LAWS = [Sample("UNILORA", config=dict(r=3, theta_d_length=11, init_theta_d_bound=0.9), identity=False, subtracts=True)]
PARITY = [
    *row("plain", "mlp conv1D llama gpt2 t5", r=3, theta_d_length=50),
    *row("default_targets", "llama gpt2 bert", **DEFAULT_TARGETS),
    *row("indices", "mlp llama", r=3, theta_d_length=50, save_indices=True),
    *row("seed", "mlp", r=3, theta_d_length=50, proj_seed=3),
    *row("longer_than_all", "mlp", r=1, theta_d_length=5000),
    *row("dropout", "mlp conv1D", r=3, theta_d_length=50, unilora_dropout=0.3),
    *row("random", "mlp", r=3, theta_d_length=50, init_weights=False),
    *row("bias_all", "mlp", r=3, theta_d_length=50, bias="all"),
    *row("bias_unilora_only", "bert", r=3, theta_d_length=50, bias="unilora_only"),
    *row("fan_in_fan_out", "gpt2", r=3, theta_d_length=50, fan_in_fan_out=True),
    *sized([*LAYERS, *CHOICE], r=3, theta_d_length=50),
]
