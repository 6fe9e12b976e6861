# SPDX-License-Identifier: Apache-2.0
"""Samples of Poly: each row of a call has its task."""

from graft.core.errors import UnsupportedLayerError
from tests.samples.laws import Sample, kinds


def _tasks(x):
    return {"task_ids": kinds(x)}


LAWS: list[Sample] = []
CALLED = [
    Sample("POLY", "", dict(r=3, n_tasks=2, n_skills=3), dict(n_splits=2), draws=True, needs=_tasks),
    Sample(
        "POLY", "random", dict(r=2, n_tasks=2, n_splits=2, init_weights=False), identity=False, draws=True, needs=_tasks
    ),
]
REFUSED = [
    ("POLY", "conv", UnsupportedLayerError, "following modules are supported: `torch.nn.Linear`"),
    ("POLY", "embedding", UnsupportedLayerError, "following modules are supported: `torch.nn.Linear`"),
    ("POLY", "norm", UnsupportedLayerError, "not supported"),
]
UNMERGEABLE = [("POLY", "", NotImplementedError, "no weight is that of all tasks")]
