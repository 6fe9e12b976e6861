# SPDX-License-Identifier: Apache-2.0
"""Samples of VB-LoRA."""

from graft.core.errors import UnsupportedLayerError
from tests.samples.laws import Sample
from tests.samples.parity import CHOICE, DEFAULT_TARGETS, EXCLUDE, LAYERS, row, sized

LAWS = [
    Sample("VBLORA", config=dict(r=3, num_vectors=7, vector_length=2, topk=3, init_vector_bank_bound=0.5),
           identity=False, subtracts=True),
]  # fmt: skip
REFUSED = [("VBLORA", trait, UnsupportedLayerError, "must be divisible by") for trait in ("odd-in", "odd-out")]
PARITY = [
    *row("plain", "mlp conv1D", r=3, num_vectors=9, vector_length=2),
    *row("plain", "llama gpt2 t5 bert", r=2, num_vectors=7, vector_length=12, topk=3),
    *row("default_targets", "llama opt gpt2 bert", num_vectors=7, vector_length=12, **DEFAULT_TARGETS),
    *row("topk_saved", "mlp", num_vectors=9, vector_length=2, save_only_topk_weights=True),
    *row("topk_saved", "llama", num_vectors=300, vector_length=6, topk=3, save_only_topk_weights=True),
    *row("dropout", "mlp conv1D", r=3, num_vectors=9, vector_length=2, vblora_dropout=0.3),
    *row("wide", "mlp", num_vectors=9, vector_length=2, init_vector_bank_bound=0.7, init_logits_std=1.3),
    *row("bias_all", "mlp", num_vectors=9, vector_length=2, bias="all"),
    *row("bias_vblora_only", "bert", num_vectors=9, vector_length=4, bias="vblora_only"),
    *row("fan_in_fan_out", "gpt2", num_vectors=9, vector_length=12, fan_in_fan_out=True),
    *sized([*LAYERS, *CHOICE, *EXCLUDE], num_vectors=9, vector_length=1),
]
