# SPDX-License-Identifier: Apache-2.0
"""What `import graft` costs, in fresh processes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field

from benchmarks.measure import Effort, Goal, Row

CODE = "import time; start = time.process_time(); {}; print(time.process_time() - start)"
USED = "from {} import LoraConfig, PeftModel, get_peft_model"  # graft resolves names when they are asked for
IMPORTS = {"graft": USED.format("graft"), "PEFT": USED.format("peft"), "floor": "import torch, safetensors.torch"}


@dataclass
class Import:
    what: str = "import (floor: torch and safetensors)"
    goal: Goal = field(default_factory=lambda: Goal(over_floor=1.1))
    long: bool = False

    def run(self, effort: Effort) -> Row:
        values: dict[str, list[float]] = {who: [] for who in IMPORTS}
        for _ in range(effort.least):
            for who, statement in IMPORTS.items():
                command = [sys.executable, "-W", "ignore", "-c", CODE.format(statement)]
                values[who].append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        return Row(self.what, values, self.goal)


BENCHES = [Import()]
