# SPDX-License-Identifier: Apache-2.0
"""Samples of DeLoRA."""

from tests.samples.laws import Sample
from tests.samples.parity import CHOICE, DEFAULT_TARGETS, EXCLUDE, LAYERS, row

LAWS = [Sample("DELORA", config=dict(r=3, delora_lambda=7), subtracts=True)]
PARITY = [
    *row("plain", "mlp llama t5 bert", r=3, delora_lambda=7),
    *row("default_targets", "llama opt", **DEFAULT_TARGETS),
    *row("dropout", "mlp llama", r=3, delora_lambda=7, module_dropout=0.3),
    *row("random", "mlp", r=3, delora_lambda=7, init_weights=False),
    *row("patterns", "llama", r=3, rank_pattern={"q_proj": 2}, lambda_pattern={r"layers\.0\..*v_proj": 5}),
    *row("bias_delora_only", "bert", r=3, delora_lambda=7, bias="delora_only"),
    *LAYERS[:2],
    *[s for s in CHOICE if s[0] in ("all-linear", "head", "classify")],
    *EXCLUDE[:1],
]
