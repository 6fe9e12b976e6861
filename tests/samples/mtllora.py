# SPDX-License-Identifier: Apache-2.0
"""Samples of MTL-LoRA: each row of a call has its task."""

from graft.core.errors import UnsupportedLayerError
from tests.samples.laws import Sample, kinds


def _tasks(x):
    return {"task_ids": kinds(x)}


LAWS: list[Sample] = []
CALLED = [
    Sample("MTLLORA", "", dict(r=3, n_tasks=2), needs=_tasks),
    Sample(
        "MTLLORA", "mixed", dict(r=2, n_tasks=2, n_up_projection=3, init_weights=False), identity=False, needs=_tasks
    ),
]
REFUSED = [
    ("MTLLORA", "conv", UnsupportedLayerError, "linear layers only"),
    ("MTLLORA", "embedding", UnsupportedLayerError, "linear layers only"),
    ("MTLLORA", "norm", UnsupportedLayerError, "not supported"),
]
UNMERGEABLE = [("MTLLORA", "", NotImplementedError, "no weight is that of all tasks")]
