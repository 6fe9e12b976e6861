# SPDX-License-Identifier: Apache-2.0
"""Samples of BOFT."""

from graft.core.errors import ConfigError
from tests.samples.laws import Sample
from tests.samples.parity import CHOICE, DEFAULT_TARGETS, EXCLUDE, LAYERS, row, sized

LAWS = [Sample("BOFT", config=dict(boft_block_size=2))]
REFUSED = [("BOFT", "odd-patch", ConfigError, "must be divisible by boft_block_size")]
PARITY = [
    *row("plain", "mlp", boft_block_size=2),
    *row("plain", "llama t5"),
    *row("plain", "conv2d", boft_block_size=3, target_modules=["conv"]),
    *row("default_targets", "llama opt", **DEFAULT_TARGETS),
    *row("blocks", "mlp llama", boft_block_size=0, boft_block_num=2),
    *row("dropout", "llama", boft_dropout=0.3),
    *row("random", "llama", init_weights=False),
    *row("bias_all", "mlp", boft_block_size=2, bias="all"),
    *row("bias_boft_only", "bert", bias="boft_only"),
    *sized([*LAYERS, *CHOICE, *EXCLUDE], boft_block_size=2),
]
