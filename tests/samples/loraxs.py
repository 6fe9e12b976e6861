# SPDX-License-Identifier: Apache-2.0
"""Samples of LoRA-XS."""

from tests.samples.laws import Sample

LAWS = [
    Sample("LORAXS", config=dict(r=3, lora_alpha=5), subtracts=True),
    Sample("LORAXS", "unsaved", dict(r=3, lora_alpha=5, save_projection=False), subtracts=True),
    Sample("LORAXS", "normal", dict(r=3, lora_alpha=5, init_weights=False), identity=1e-3, subtracts=True),
]
