# SPDX-License-Identifier: Apache-2.0
"""Samples of T-LoRA: each row of a call has its timestep."""

from graft.core.errors import UnsupportedLayerError
from tests.samples.laws import Sample, kinds


def _timesteps(x):
    return {"timestep": 900 - 600 * kinds(x)}


LAWS: list[Sample] = []
CALLED = [
    Sample("TLORA", "", dict(r=3, lora_alpha=5, min_rank=2), needs=_timesteps),
    Sample("TLORA", "last", dict(r=2, sig_type="last"), needs=_timesteps),
    Sample("TLORA", "middle", dict(r=3, sig_type="middle", use_data_init=False), needs=_timesteps),
    Sample("TLORA", "random", dict(r=3, init_weights=False, alpha_rank_scale=0.5), identity=False, needs=_timesteps),
]
REFUSED = [
    ("TLORA", "grouped", UnsupportedLayerError, "no factors for a convolution with groups"),
    ("TLORA", "norm", UnsupportedLayerError, "not supported"),
]
UNMERGEABLE = [("TLORA", "", NotImplementedError, "no weight is that of all of them")]
