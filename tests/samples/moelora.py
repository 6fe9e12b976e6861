# SPDX-License-Identifier: Apache-2.0
"""Samples of MoE-LoRA."""

from graft.core.errors import UnsupportedLayerError
from tests.samples.laws import Sample

LAWS = [
    Sample("MOELORA", "", dict(r=3, num_experts=4, router_loss=True), dict(num_experts=3)),
    Sample("MOELORA", "hydra", dict(r=2, lora_alpha=6, num_experts=3, top_k=None, shared_A=True)),
    Sample("MOELORA", "random", dict(r=2, num_experts=3, init_weights=False), identity=False),
]
REFUSED = [
    ("MOELORA", "conv", UnsupportedLayerError, "linear layers only"),
    ("MOELORA", "embedding", UnsupportedLayerError, "linear layers only"),
]
UNMERGEABLE = [("MOELORA", "", NotImplementedError, "routers weigh experts by each token")]
