# SPDX-License-Identifier: Apache-2.0
"""The room of many trainings: many adapters train at once on one base, each exactly as in a training of one adapter.

Entry points: `graft.MultiTrain`, which `add` gives runs, and `graft.sweep`, which searches settings.

- `runs.py`: `MultiTrain`, its loop, the calls that train runs by steps, and its folder.
- `run.py`: one run, an adapter with its batches, optimizer and schedule; it knows no other run.
- `joint.py`: one pass of the model for the batches of several runs.
"""

from graft.io.files import AdapterSnapshot
from graft.many.run import BatchResult, Run, StepRecord, ValidationRecord
from graft.many.runs import MultiTrain, Step
from graft.many.sweep import Sweep, Trial, sweep

__all__ = [
    "AdapterSnapshot", "BatchResult", "MultiTrain", "Run", "Step", "StepRecord", "Sweep", "Trial", "ValidationRecord",
    "sweep",
]  # fmt: skip
