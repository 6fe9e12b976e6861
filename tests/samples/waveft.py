# SPDX-License-Identifier: Apache-2.0
"""Samples of WaveFT."""

from tests.samples.laws import Sample
from tests.samples.parity import CHOICE, DEFAULT_TARGETS, EXCLUDE, LAYERS, row, sized

LAWS = [
    Sample("WAVEFT", config=dict(n_frequency=20, scaling=1.3)),
    Sample("WAVEFT", "long", dict(n_frequency=21, scaling=1.3, wavelet_family="sym3")),
    Sample("WAVEFT", "plain", dict(n_frequency=20, scaling=1.3, use_idwt=False)),
]
SMALL = dict(n_frequency=30, scaling=1.3)
PARITY = [
    *row("plain", "mlp conv1D llama gpt2 t5", **SMALL),
    *row("default_targets", "llama gpt2 bert", **SMALL, **DEFAULT_TARGETS),
    *row("random", "mlp llama", **SMALL, init_weights=False),
    *(r for family in ("db4", "sym5", "coif2") for r in row(family, "mlp", **SMALL, wavelet_family=family)),
    *row("entries", "llama", **SMALL, use_idwt=False, random_loc_seed=3),
    *row("patterns", "mlp", **SMALL, n_frequency_pattern={"lin0": 20, r"layers\.0\.fc1": 7}),
    *row("proportional", "mlp llama", **SMALL, proportional_parameters=True),
    *row("bias_waveft_only", "bert", **SMALL, bias="waveft_only"),
    *row("fan_in_fan_out", "gpt2", **SMALL, fan_in_fan_out=True),
    *sized(LAYERS[:2] + [s for s in CHOICE if s[0] in ("all-linear", "head", "classify")] + EXCLUDE[:1], **SMALL),
]
