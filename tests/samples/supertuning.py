# SPDX-License-Identifier: Apache-2.0
"""Samples of Super-Tuning."""

from tests.samples.laws import Sample
from tests.samples.parity import CHOICE, DEFAULT_TARGETS, row, sized

LAWS = [
    Sample("SUPERTUNING", config=dict(sparsity=0.8)),
    Sample("SUPERTUNING", "lora", dict(sparsity=0.9, r=2, lora_alpha=3)),
]
PARITY = [
    *row("plain", "mlp t5", sparsity=0.9),
    *row("plain", "llama", sparsity=0.96),
    *row("default_targets", "llama opt bert", sparsity=0.9, **DEFAULT_TARGETS),
    *row("bottom", "mlp", sparsity=0.95, select_top=False),
    *row("lora", "mlp llama", sparsity=0.9, r=3, lora_alpha=5),
    *row("alpha", "mlp", sparsity=0.9, r=3),
    *row("dropout", "mlp", sparsity=0.9, r=3, lora_alpha=5, lora_dropout=0.3),
    *row("random", "mlp", sparsity=0.9, init_weights=False, r=3, lora_alpha=5),
    *row("unsaved", "mlp", sparsity=0.9, save_precomputed_indices=False),
    *row("dense", "mlp", sparsity=0.0),
    *sized(CHOICE, sparsity=0.9),
]
