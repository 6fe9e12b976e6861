# SPDX-License-Identifier: Apache-2.0
"""Start the processes of the distributed checks, and collect what they found."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from pathlib import Path

from tests.distributed.processes import started


def run(folder: Path, layouts: list[str], world: int = 2, timeout: float = 420, packages: str = "") -> dict[str, str]:
    """Return, by check, an empty text if all processes passed it, else tracebacks.

    packages: a folder with packages beside those of this environment.
    """
    paths = [str(Path(packages).resolve()) if packages else "", os.environ.get("PYTHONPATH", "")]
    shutil.rmtree(folder, ignore_errors=True)  # a store from before would have answers of then
    folder.mkdir(parents=True)
    return started(
        lambda rank: ["tests.distributed.worker", str(folder), str(rank), str(world), *layouts],
        folder, world, timeout, GRAFT_PATIENCE="5", DS_ACCELERATOR="cpu", MASTER_PORT=str(free_port()),
        PYTHONPATH=os.pathsep.join(filter(None, paths)),
    )  # fmt: skip


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


if __name__ == "__main__":
    results = run(Path(sys.argv[1]), sys.argv[2:], timeout=100)
    print(sum(not text for text in results.values()), "passed")
    for name, text in results.items():
        if text:
            print(f"\n{name}\n{text}")
