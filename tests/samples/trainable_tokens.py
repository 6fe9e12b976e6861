# SPDX-License-Identifier: Apache-2.0
"""Samples of Trainable tokens."""

from graft.core.errors import UnsupportedLayerError
from tests.samples.laws import Sample
from tests.samples.parity import row

LAWS = [
    Sample("TRAINABLE_TOKENS", config=dict(token_indices=[4, 1, 3]), other=dict(token_indices=[0, 5])),
]
REFUSED = [
    ("TRAINABLE_TOKENS", "conv", UnsupportedLayerError, "nly embeddings and linear layers have a row for each token"),
    ("TRAINABLE_TOKENS", "norm", UnsupportedLayerError, "nly embeddings and linear layers have a row for each token"),
]
PARITY = [
    *row("rows", "embedding", token_indices=[3, 1, 7]),
    *row("rows", "llama", token_indices=[3, 1, 7], target_modules=["embed_tokens"]),
]
