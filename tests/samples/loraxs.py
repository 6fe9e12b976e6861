# SPDX-License-Identifier: Apache-2.0
"""Samples of LoRA-XS."""

import graft
from graft.core.errors import UnsupportedLayerError
from tests.samples.laws import Sample


def _step(base, cfg, x):
    graft.preprocess_lorasb(base, cfg, lambda: base(x).square().sum().backward(), 0.1)


LAWS = [
    Sample("LORAXS", config=dict(r=3, lora_alpha=5), subtracts=True),
    Sample("LORAXS", "unsaved", dict(r=3, lora_alpha=5, save_projection=False), subtracts=True),
    Sample("LORAXS", "normal", dict(r=3, lora_alpha=5, init_weights=False), identity=1e-3, subtracts=True),
    Sample("LORAXS", "sb", dict(r=3, lora_alpha=5, init_weights="sb"), dict(init_weights=True), identity=False,
           subtracts=True, prepare=_step),
]  # fmt: skip
REFUSED = [("LORAXS-sb", trait, UnsupportedLayerError, "linear layers only") for trait in ("conv", "embedding")]
