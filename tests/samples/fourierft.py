# SPDX-License-Identifier: Apache-2.0
"""Samples of FourierFT."""

from tests.samples.laws import Sample
from tests.samples.parity import CHOICE, DEFAULT_TARGETS, EXCLUDE, LAYERS, row, sized

LAWS = [
    Sample("FOURIERFT", config=dict(n_frequency=20, scaling=37, init_weights=True)),
    Sample("FOURIERFT", "random", dict(n_frequency=13, scaling=37), dict(n_frequency=8), identity=False),
]
SMALL = dict(n_frequency=30, scaling=11)
PARITY = [
    *row("plain", "mlp conv1D llama gpt2 t5", **SMALL),
    *row("default_targets", "llama gpt2 bert", **SMALL, **DEFAULT_TARGETS),
    *row("zeros", "mlp", **SMALL, init_weights=True),
    *row("dense", "llama", n_frequency=250, scaling=7, random_loc_seed=3),
    *row("patterns", "llama", **SMALL, n_frequency_pattern={"q_proj": 20, r"layers\.0\.self_attn\.v_proj": 7}),
    *row("bias_fourier_only", "bert", **SMALL, bias="fourier_only"),
    *row("fan_in_fan_out", "gpt2", **SMALL, fan_in_fan_out=True),
    *sized(LAYERS[:2] + [s for s in CHOICE if s[0] in ("all-linear", "head", "classify")] + EXCLUDE[:1], **SMALL),
]
