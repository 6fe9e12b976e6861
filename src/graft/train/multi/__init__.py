# SPDX-License-Identifier: Apache-2.0
"""Many adapters trained at once on one base, each as it would be trained alone."""

from graft.train.multi.run import Point, Run, Valid
from graft.train.multi.runs import MultiTrain, Step
from graft.train.multi.sweep import Sweep, Trial, sweep

__all__ = ["MultiTrain", "Point", "Run", "Step", "Sweep", "Trial", "Valid", "sweep"]
