# SPDX-License-Identifier: Apache-2.0
"""Samples of DEFT."""

from tests.samples.laws import Sample
from tests.samples.parity import CHOICE, DEFAULT_TARGETS, EXCLUDE, LAYERS, row, sized

LAWS = [
    Sample("DEFT", config=dict(r=2, alpha=3), subtracts=True),
    Sample("DEFT", "dropout", dict(r=2, deft_dropout=0.1, decomposition_method="qr"), draws=True, subtracts=True),
    Sample("DEFT", "para", dict(r=2, para=True, decomposition_method="qr"), identity=False, subtracts=True),
]
PARITY = [
    *row("plain", "mlp t5", r=3, alpha=5),
    *row("plain", "llama", r=3, alpha=5, target_modules=["k_proj", "down_proj"]),
    *row("plain", "conv1D", r=3, alpha=5, fan_in_fan_out=True),
    *row("default_targets", "llama opt gpt2", r=3, **DEFAULT_TARGETS),
    *row("qr", "mlp llama", r=3, decomposition_method="qr"),
    *row("para", "mlp llama", r=3, para=True),
    *row("para_qr", "mlp", r=3, para=True, decomposition_method="qr"),
    *row("dropout", "mlp", r=3, alpha=5, deft_dropout=0.3),
    *row("random", "mlp", r=3, init_weights=False, init_scale=1.7),
    *row("wide", "mlp", r=32, alpha=5),
    *row("bias_all", "mlp", r=3, bias="all"),
    *row("bias_deft_only", "bert", r=3, bias="deft_only"),
    *sized([*LAYERS, *CHOICE, *EXCLUDE], r=3),
]
