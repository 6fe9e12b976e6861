# SPDX-License-Identifier: Apache-2.0
"""Samples of Lily."""

from graft.core.errors import UnsupportedLayerError
from tests.samples.laws import Sample
from tests.samples.parity import CHOICE, DEFAULT_TARGETS, EXCLUDE, LAYERS, row

LAWS = [Sample("LILY", config=dict(r=3, num_B=3, scaling=1.37), by_row=False)]
REFUSED = [("LILY", "grouped", UnsupportedLayerError, "would mix them")]
UNMERGEABLE = [("LILY", "", NotImplementedError, "mixes its projections anew")]
PARITY = [
    # PEFT's second adapter shares nothing, so that tests with two compare where there is nothing to share
    *row("plain", "mlp", r=4, target_modules=["lin0", "1.fc1", "2.fc2"]),
    *row("plain", "llama", r=4, target_modules=["0.self_attn.q_proj", "1.self_attn.v_proj", "0.mlp.down_proj"]),
    *row("shared", "mlp llama t5 bert", r=4),
    *row("default_targets", "llama opt bert", r=4, **DEFAULT_TARGETS),
    *row("stride", "mlp llama", r=4, stride_A=2, num_B=3, scaling=1.37),
    *row("random", "mlp llama", r=4, init_weights=False),
    *LAYERS,
    *(sample for sample in CHOICE if sample[0] != "head"),
    *row("head", "mlp", modules_to_save=["head"], target_modules=["lin0", "1.fc1"]),
    *EXCLUDE,
]
