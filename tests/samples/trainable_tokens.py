# SPDX-License-Identifier: Apache-2.0
"""Samples of Trainable tokens."""

from graft.core.errors import UnsupportedLayerError
from tests.samples.laws import Sample
from tests.samples.parity import row

LAWS = [
    Sample("TRAINABLE_TOKENS", config=dict(token_indices=[4, 1, 3]), other=dict(token_indices=[0, 5])),
    Sample("TRAINABLE_TOKENS", "repeated", config=dict(token_indices=[4, 1, 4]), other=dict(token_indices=[0, 5])),
]
REFUSED = [
    ("TRAINABLE_TOKENS", "conv", UnsupportedLayerError, "nly embeddings and linear layers have a row for each token"),
    ("TRAINABLE_TOKENS", "norm", UnsupportedLayerError, "nly embeddings and linear layers have a row for each token"),
]
PARITY = [
    *row("rows", "embedding", token_indices=[3, 1, 7]),
    *row("rows", "llama", token_indices=[3, 1, 7], target_modules=["embed_tokens"]),
    *row("default_targets", "llama", token_indices=[3, 1, 7], target_modules=None),
    # PEFT draws in the dtype of the base, graft in float32: test_init.py has what is equal
    *row("random", "embedding", "init", token_indices=[3, 1], init_weights=False),
    *row("head", "llama", token_indices=[4, 6], target_modules=["lm_head"]),
]
