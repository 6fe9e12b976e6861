# SPDX-License-Identifier: Apache-2.0
"""Samples of LoKr."""

from tests.samples.laws import Sample
from tests.samples.parity import CHOICE, DEFAULT_TARGETS, EXCLUDE, LAYERS, row

BOTH = dict(r=1, alpha=1.3, decompose_both=True, decompose_factor=6, use_effective_conv2d=True)
LAWS = [
    Sample("LOKR", config=dict(r=3, alpha=4)),
    Sample("LOKR", "both", BOTH),
]
SMALL = dict(r=2, alpha=3)
PARITY = [
    *row("plain", "mlp conv1d conv2d llama t5 bert-qa", **SMALL),
    *row("default_targets", "llama opt", **DEFAULT_TARGETS),
    *row("full", "mlp conv2d conv1d", r=5, alpha=4),
    *row("effective", "conv2d", r=1, alpha=1.3, use_effective_conv2d=True),
    *row("both", "llama conv2d", r=1, alpha=13, decompose_both=True, decompose_factor=6),
    *row("grouped", "conv2d", **SMALL, target_modules=["grouped", "rect", "dilated"]),
    *row("rank_dropout", "mlp conv2d", **SMALL, rank_dropout=0.4, rank_dropout_scale=True),
    *row("module_dropout", "mlp", **SMALL, module_dropout=0.4),
    *row("lycoris", "mlp conv2d", **SMALL, init_weights="lycoris"),
    *row("random", "mlp conv2d", r=1, alpha=1.3, init_weights=False, decompose_both=True),
    *row("patterns", "llama", r=3, alpha=4, rank_pattern={"q_proj": 2}, alpha_pattern={r"layers\.0\..*v_proj": 7}),
    *LAYERS[:2],
    *[s for s in CHOICE if s[0] in ("all-linear", "head", "classify")],
    *EXCLUDE[:1],
]
