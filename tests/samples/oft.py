# SPDX-License-Identifier: Apache-2.0
"""Samples of OFT."""

from tests.samples.laws import Sample
from tests.samples.parity import CHOICE, DEFAULT_TARGETS, EXCLUDE, LAYERS, row

LAWS = [
    Sample("OFT", config=dict(oft_block_size=3)),
    Sample("OFT", "exact", dict(oft_block_size=3, use_cayley_neumann=False)),
    Sample("OFT", "shared", dict(oft_block_size=3, block_share=True)),
    Sample("OFT", "constrained", dict(oft_block_size=3, coft=True, eps=0.9)),
]
PARITY = [
    *row("plain", "mlp llama t5", r=0, oft_block_size=4),
    *row("plain", "embedding", oft_block_size=3),
    *row("plain", "conv2d", oft_block_size=3, target_modules=["point", "lin"]),
    *row("default_targets", "llama opt", **DEFAULT_TARGETS),
    *row("by_r", "mlp llama", r=2, oft_block_size=0),
    *row("adjusted", "mlp", oft_block_size=7),
    *row("adjusted_r", "llama", r=5, oft_block_size=0),
    *row("exact", "mlp embedding", oft_block_size=4, use_cayley_neumann=False),
    *row("terms_2", "mlp", oft_block_size=4, num_cayley_neumann_terms=2),
    *row("terms_3", "mlp", oft_block_size=4, num_cayley_neumann_terms=3),
    *row("terms_4", "mlp", oft_block_size=4, num_cayley_neumann_terms=4),
    *row("terms_8", "mlp", oft_block_size=4, num_cayley_neumann_terms=8),
    *row("coft", "mlp", oft_block_size=4, coft=True, eps=0.07),
    *row("coft_exact", "embedding", oft_block_size=4, coft=True, eps=0.07, use_cayley_neumann=False),
    *row("block_share", "mlp embedding", oft_block_size=4, block_share=True),
    *row("block_share_coft", "mlp", oft_block_size=2, block_share=True, coft=True, eps=0.3),
    *row("dropout", "mlp", oft_block_size=4, module_dropout=0.3),
    *row("random", "mlp embedding", oft_block_size=4, init_weights=False),
    *row("bias_all", "mlp", oft_block_size=4, bias="all"),
    *row("bias_oft_only", "bert", oft_block_size=4, bias="oft_only"),
    # PEFT folds the rotated patches back by summing overlaps, which changes even a fresh adapter's output
    *row("kernel", "conv2d", "forward merge", oft_block_size=9, target_modules=["conv"]),
    *row("fan_in_fan_out", "mlp", oft_block_size=4, fan_in_fan_out=True),
    *LAYERS,
    *CHOICE,
    *EXCLUDE,
]
