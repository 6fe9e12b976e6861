# SPDX-License-Identifier: Apache-2.0
"""Samples of HRA."""

from tests.samples.laws import Sample
from tests.samples.parity import CHOICE, DEFAULT_TARGETS, EXCLUDE, LAYERS, row

LAWS = [
    Sample("HRA", config=dict(r=4)),
    Sample("HRA", "orthogonal", dict(r=2, apply_GS=True), identity=False),
]
PARITY = [
    *row("plain", "mlp conv2d llama t5", r=4),
    *row("default_targets", "llama opt", **DEFAULT_TARGETS),
    *row("odd", "mlp", r=3),
    *row("gram_schmidt", "mlp conv2d", r=4, apply_GS=True),
    *row("gram_schmidt_random", "mlp", r=3, apply_GS=True, init_weights=False),
    *row("random", "mlp conv2d", r=4, init_weights=False),
    *row("bias_all", "mlp conv2d", r=4, bias="all"),
    *row("bias_hra_only", "bert", r=4, bias="hra_only"),
    # PEFT ignores the dilation
    *row("dilated", "conv2d", "forward", r=4, target_modules=["dilated"]),
    *LAYERS,
    *CHOICE,
    *EXCLUDE,
]
