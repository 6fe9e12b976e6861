# SPDX-License-Identifier: Apache-2.0
"""A process that trains runs and is killed: `python -m tests.many.killed FOLDER STEP NAMES…`.

It goes on with what the folder holds, and saves after each round; at STEP it kills itself in the middle of a save.
"""

import os
import signal
import sys

import torch

from graft.config import atomic
from graft.many import MultiTrain, run_file
from tests.many.alone import SPECS, tiny

STEPS = 10


def kill_in_the_last_save(runs: int) -> None:
    sync, calls = atomic.sync_file, []

    def kill(path: str) -> None:
        calls.append(path)
        if len(calls) == 2 * runs - 1:  # the file is written, and has not its name yet
            os.kill(os.getpid(), signal.SIGKILL)
        sync(path)

    atomic.sync_file = kill


def main(folder: str, at: int, names: list[str]) -> None:
    torch.set_num_threads(1)
    base = tiny()
    runs = MultiTrain.resume(base, folder) if run_file.list_runs(folder) else MultiTrain(base)
    for name in names:
        runs.add(name, SPECS[name].config, **SPECS[name].options(STEPS))
    for step in runs:
        if step.number == at:
            kill_in_the_last_save(len(names))
        runs.save(folder)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
