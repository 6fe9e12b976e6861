# SPDX-License-Identifier: Apache-2.0
"""Samples of LoHa."""

from tests.samples.laws import Sample
from tests.samples.parity import CHOICE, DEFAULT_TARGETS, EXCLUDE, LAYERS, row

LAWS = [
    Sample("LOHA", config=dict(r=3, alpha=5)),
    Sample("LOHA", "effective", dict(r=3, alpha=5, use_effective_conv2d=True)),
    Sample("LOHA", "khatri_rao", dict(r=3, alpha=5, use_khatri_rao=True)),
    Sample("LOHA", "abba", dict(r=3, alpha=5, init_weights="abba")),
]
PARITY = [
    *row("plain", "mlp conv1d conv2d llama t5 bert-qa", r=3, alpha=4),
    *row("default_targets", "llama opt", **DEFAULT_TARGETS),
    # PEFT takes the gradient of w1_a through the factors of w2_a, and the other way round
    *row("effective", "conv2d conv1d", "gradients", r=3, alpha=4, use_effective_conv2d=True),
    *row("grouped", "conv2d", r=3, alpha=4, target_modules=["grouped", "rect", "dilated"]),
    *row("grouped", "conv1d", r=3, alpha=4, target_modules=["grouped"]),
    *row("grouped_effective", "conv2d", "gradients", r=3, alpha=4, target_modules=["grouped", "rect"],
         use_effective_conv2d=True),
    *row("rank_dropout", "mlp conv2d", r=3, alpha=4, rank_dropout=0.4),
    *row("module_dropout", "mlp", r=3, alpha=4, module_dropout=0.4),
    *row("random", "mlp conv2d", r=3, alpha=4, init_weights=False),
    *row("random_effective", "conv2d conv1d", "gradients", r=3, alpha=4, init_weights=False, use_effective_conv2d=True),
    *row("patterns", "llama", r=3, alpha=4, rank_pattern={"q_proj": 2}, alpha_pattern={r"layers\.0\..*v_proj": 7}),
    *LAYERS,
    *CHOICE,
    *EXCLUDE,
]  # fmt: skip
