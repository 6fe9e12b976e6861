# SPDX-License-Identifier: Apache-2.0
"""Samples of GraLoRA."""

from graft.core.errors import UnsupportedLayerError
from tests.samples.laws import Sample
from tests.samples.parity import CHOICE, DEFAULT_TARGETS, LAYERS, row, sized

LAWS = [
    Sample("GRALORA", config=dict(r=4, alpha=5), subtracts=True),
    Sample("GRALORA", "hybrid", dict(r=2, alpha=5, hybrid_r=3), subtracts=True),
]
REFUSED = [
    ("GRALORA", "odd-in", UnsupportedLayerError, "in_features should be divisible by gralora_k"),
    ("GRALORA", "odd-out", UnsupportedLayerError, "out_features should be divisible by gralora_k"),
]
PARITY = [
    *row("plain", "mlp conv1D llama gpt2 t5", r=4, alpha=5),
    *row("default_targets", "llama bert", alpha=70, **DEFAULT_TARGETS),
    *row("blocks", "llama", r=9, alpha=5, gralora_k=3),
    *row("hybrid", "mlp conv1D llama", r=4, alpha=5, hybrid_r=3),
    *row("dropout", "mlp conv1D", r=4, alpha=5, gralora_dropout=0.3),
    *row("random", "mlp", r=4, alpha=5, hybrid_r=2, init_weights=False),
    *row("bias_gralora_only", "bert", r=4, alpha=5, bias="gralora_only"),
    *row("fan_in_fan_out", "gpt2", r=4, alpha=5, fan_in_fan_out=True),
    *sized([*LAYERS[:2], *row("all-linear", "llama", target_modules="all-linear")], r=4, alpha=5),
    *sized([s for s in CHOICE if s[0] in ("head", "classify")], r=4, alpha=5),
]
