# SPDX-License-Identifier: Apache-2.0
"""Start the processes of the distributed checks, and collect what they found."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(folder: Path, layouts: list[str], world: int = 2, timeout: float = 420, packages: str = "") -> dict[str, str]:
    """Return, by check, an empty text if all processes passed it, else tracebacks.

    packages: a folder with packages beside those of this environment.
    """
    paths = [*filter(None, [str(Path(packages).resolve()) if packages else ""]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GRAFT_PATIENCE": "5", "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)), "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)  # a store from before would have answers of then
    folder.mkdir(parents=True)
    logs = [(folder / f"{rank}.log").open("w+") for rank in range(world)]
    begun = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.worker", str(folder), str(rank), str(world), *layouts],
            cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]  # fmt: skip
    try:
        for process in begun:
            process.wait(timeout)
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in begun:
            process.kill()
            process.wait()
    found: dict[str, str] = {}
    for rank, (process, log) in enumerate(zip(begun, logs)):
        report = folder / f"{rank}.json"
        done = json.loads(report.read_text()) if report.exists() else {}
        for name, text in done.items():
            found[name] = found.get(name, "") + (f"rank {rank}: {text}\n" if text else "")
        log.seek(0)
        if process.returncode:
            found["all"] = (
                found.get("all", "") + f"rank {rank} ended with {process.returncode}:\n{log.read()[-4000:]}\n"
            )
        log.close()
    return found


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
