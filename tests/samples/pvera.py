# SPDX-License-Identifier: Apache-2.0
"""Samples of PVeRA."""

from graft.core.errors import UnsupportedLayerError
from tests.samples.laws import Sample
from tests.samples.parity import CHOICE, DEFAULT_TARGETS, LAYERS, row, sized

LAWS = [Sample("PVERA", config=dict(r=3), subtracts=True, draws=True)]
REFUSED = [("PVERA", "grouped", UnsupportedLayerError, "draws one value for all inputs")]
PARITY = sized(  # with a seed, so that both draw the same in training
    [
        *row("plain", "mlp conv1D llama gpt2"),
        *row("default_targets", "llama gpt2", **DEFAULT_TARGETS),
        *row("key", "mlp", projection_prng_key=3),
        *row("unsaved", "mlp llama", save_projection=False),
        *row("dropout", "mlp", pvera_dropout=0.3),
        *row("d_initial", "mlp", d_initial=0.37),
        *row("random", "mlp", init_weights=False),
        *row("bias_all", "mlp", bias="all"),
        *row("bias_pvera_only", "bert", bias="pvera_only"),
        *row("fan_in_fan_out", "gpt2", fan_in_fan_out=True),
        *LAYERS,
        *CHOICE,
    ],
    r=5,
    generator_seed=7,
)
