# SPDX-License-Identifier: Apache-2.0
"""Samples of HiRA."""

from tests.samples.laws import Sample
from tests.samples.parity import CHOICE, DEFAULT_TARGETS, EXCLUDE, LAYERS, row

LAWS = [
    Sample("HIRA", config=dict(r=3)),
    Sample("HIRA", "random", dict(r=2, init_weights=False), identity=False),
]
PARITY = [
    *row("plain", "mlp embedding conv1d conv2d conv3d llama t5 bert", r=3),
    # else graft corrects it in the config, and PEFT only says so
    *row("plain", "conv1D gpt2", r=3, fan_in_fan_out=True),
    *row("default_targets", "llama opt bert", r=3, **DEFAULT_TARGETS),
    *row("default_targets", "gpt2", r=3, fan_in_fan_out=True, **DEFAULT_TARGETS),
    *row("dropout", "mlp conv1d conv2d embedding llama", r=3, hira_dropout=0.3),
    *row("random", "mlp conv2d embedding", r=3, init_weights=False),
    *row("none", "mlp conv1d", r=3, init_weights=None),
    *row("gaussian", "mlp embedding", r=3, init_weights="gaussian"),
    # PEFT takes the other initialisation there
    *row("gaussian", "conv2d", "init rng", r=3, init_weights="gaussian"),
    *row("dilated", "conv2d", r=3, target_modules=["dilated", "rect"]),
    # PEFT's update of the embedding lacks the factor of the embedding
    *row("embed", "gemma3", "forward merge", r=3, target_modules=["embed_tokens", "q_proj"]),
    *LAYERS,
    *CHOICE,
    *EXCLUDE,
]
