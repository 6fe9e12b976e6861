# SPDX-License-Identifier: Apache-2.0
"""Samples of OSF."""

from tests.samples.laws import Sample
from tests.samples.parity import CHOICE, DEFAULT_TARGETS, row

LAWS = [
    Sample("OSF"),
    Sample("OSF", "narrow", dict(effective_rank=0.9), subtracts=True),
]
PARITY = [
    # PEFT runs the first of several adapters, cannot unmerge, and its hooks fail under autocast
    *row("plain", "mlp llama t5", "several unmerge autocast"),
    *row("default_targets", "llama opt", **DEFAULT_TARGETS),
    *row("default_targets", "mlp", **DEFAULT_TARGETS),
    *row("number", "mlp", effective_rank=3),
    *row("share", "mlp", effective_rank=0.7),
    *row("pattern", "mlp", rank_pattern={"layers.1.fc1": 2, "lin": 0.3}),
    *row("drawn", "mlp", init_weights=False),
    *CHOICE,
]
