# SPDX-License-Identifier: Apache-2.0
"""Samples of TinyLoRA."""

from tests.samples.laws import Sample
from tests.samples.parity import CHOICE, DEFAULT_TARGETS, LAYERS, row, sized

LAWS = [Sample("TINYLORA", config=dict(r=3, u=5), subtracts=True)]
PARITY = [
    *row("plain", "mlp embedding llama t5", u=7),
    *row("plain", "conv1D gpt2", u=7, fan_in_fan_out=True),  # else PEFT takes Wᵀ for the second adapter
    *row("default_targets", "llama gpt2 bert", **DEFAULT_TARGETS),
    *row("wide", "mlp embedding", r=100, u=7),
    *row("tied", "mlp llama", u=7, weight_tying=0.6),
    *row("one", "mlp llama", u=7, weight_tying=1.0),
    *row("seed", "mlp", u=7, projection_seed=3),
    *row("unsaved", "mlp llama", u=7, save_projection=False),
    *row("uniform", "mlp", u=7, init_weights="uniform", init_v_bound=0.3),
    *row("dropout", "mlp conv1D", u=7, tinylora_dropout=0.3),
    *row("bias_all", "mlp", u=7, bias="all"),
    *row("bias_tinylora_only", "bert", u=7, bias="tinylora_only"),
    *row("fan_in_fan_out", "gpt2", u=7, fan_in_fan_out=True),
    *sized([*LAYERS, *CHOICE], u=7),
]
