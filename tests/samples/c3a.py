# SPDX-License-Identifier: Apache-2.0
"""Samples of C3A."""

from graft.core.errors import UnsupportedLayerError
from tests.samples.laws import Sample
from tests.samples.parity import DEFAULT_TARGETS, row

LAWS = [Sample("C3A", config=dict(block_size=2, init_weights="gaussian"), identity=False)]
REFUSED = [
    ("C3A", "odd-in", UnsupportedLayerError, "The block size should be a factor of the input size"),
    ("C3A", "odd-out", UnsupportedLayerError, "The block size should be a factor of the output size"),
]
BLOCKS = dict(target_modules=["fc1", "fc2"], block_size=4)
WRONG = "gradients"  # PEFT's gradient of the input is that of another matrix
PARITY = [
    *row("plain", "llama t5 bert", WRONG, block_size=12),
    *row("plain", "mlp", WRONG, **BLOCKS),
    *row("default_targets", "llama opt", WRONG, block_size=6, **DEFAULT_TARGETS),
    *row(
        "patterns", "llama", WRONG, block_size=12, block_size_pattern={"q_proj": 8, r"layers\.0\.self_attn\.v_proj": 3}
    ),
    *(
        r
        for start in (True, False, "gaussian", "kaiming_uniform")
        for r in row(f"{start}", "mlp", WRONG, **BLOCKS, init_weights=start)
    ),
    *row("bias_c3a_only", "bert", WRONG, block_size=12, bias="c3a_only"),
    *row("layer", "llama", WRONG, layers_to_transform=1, block_size=4),
    *row("head", "mlp", WRONG, block_size=2, modules_to_save=["head"]),
    *row("classify", "bert-seq", WRONG, block_size=8, task_type="SEQ_CLS"),
]
