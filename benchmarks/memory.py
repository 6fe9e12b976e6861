# SPDX-License-Identifier: Apache-2.0
"""Peak memory of fresh processes, as the operating system saw it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

from benchmarks.files import saved
from benchmarks.measure import LIBS, Effort, Goal, Row

LAYERS = 30
NO_HOLES = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # each tensor has pages of its own: a heap's holes say nothing of a call
CODE = """
import torch
torch.set_num_threads(1)
from benchmarks import measure, models, training  # both libraries, in every process
{}
status = dict(line.split(":") for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) * 1024)  # getrusage counts the parent's memory, too
"""
LOAD = "model = measure.LIBS[{who!r}].PeftModel.from_pretrained(models.smollm(), {folder!r})"
STEP = """
model = training.adapted(measure.LIBS[{who!r}], torch.{dtype}, {options}, {layers})
training.step(model, training.inputs(torch.{dtype}))
"""
FLOORS = {
    LOAD: "model = models.smollm()",
    STEP: "training.step(training.base(torch.{dtype}, {layers}), training.inputs(torch.{dtype}))",
}


@dataclass
class Peak:
    what: str
    code: str
    goal: Goal
    facts: dict[str, Any] = field(default_factory=dict)
    long: bool = True

    def run(self, effort: Effort) -> Row:
        facts = dict(self.facts, folder=saved(), layers=LAYERS)
        codes = {who: self.code.format(who=who, **facts) for who in LIBS} | {"floor": FLOORS[self.code].format(**facts)}
        return Row(self.what, {who: [peak(code)] for who, code in codes.items()}, self.goal, unit="B")


def peak(code: str, **environment: str) -> float:
    """Bytes."""
    command = [sys.executable, "-W", "ignore", "-c", CODE.format(code)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment)
    return float(found.stdout.split()[-1])


BENCHES = [
    Peak("peak memory, from_pretrained (floor: the base)", LOAD, Goal(faster=0.99)),
    Peak("peak memory, LoRA step, 30 layers, float32", STEP, Goal(faster=1.0), dict(dtype="float32", options={})),
    Peak("peak memory, LoRA step, 30 layers, bf16", STEP, Goal(faster=1.0), dict(dtype="bfloat16", options={})),
    Peak(
        "peak memory, the same + dropout",
        STEP,
        Goal(faster=1.0),
        dict(dtype="bfloat16", options={"lora_dropout": 0.05}),
    ),
]
BENCHES = BENCHES if sys.platform.startswith("linux") else []  # elsewhere there is no /proc
