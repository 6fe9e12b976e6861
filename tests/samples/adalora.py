# SPDX-License-Identifier: Apache-2.0
"""Samples of AdaLoRA."""

from tests.samples.laws import Sample

LAWS = [
    Sample(
        "ADALORA",
        config=dict(init_r=4, target_r=2, lora_alpha=6, total_step=9),
        other=dict(inference_mode=True),  # one trains at a time
        subtracts=True,
    ),
]
