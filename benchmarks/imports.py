# SPDX-License-Identifier: Apache-2.0
"""What `import graft` costs, in fresh processes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field

from benchmarks.measure import Effort, Goal, Row

CODE = "import time; start = time.process_time(); import {}; print(time.process_time() - start)"
MODULES = {"graft": "graft", "PEFT": "peft", "floor": "torch"}


@dataclass
class Import:
    what: str = "import (floor: import torch)"
    goal: Goal = field(default_factory=lambda: Goal(over_floor=1.15))

    def run(self, effort: Effort) -> Row:
        values: dict[str, list[float]] = {who: [] for who in MODULES}
        for _ in range(effort.least):
            for who, module in MODULES.items():
                command = [sys.executable, "-W", "ignore", "-c", CODE.format(module)]
                values[who].append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        return Row(self.what, values, self.goal)


BENCHES = [Import()]
