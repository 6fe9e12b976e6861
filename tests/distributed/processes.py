# SPDX-License-Identifier: Apache-2.0
"""Checks that two or more processes run at once: `run` starts them, on a module that has `checks()`.

Each process writes what became of a check into a file of its own, so that one that dies leaves what it found so far.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import traceback
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def run(
    module: str, folder: Path, *layouts: str, world: int = 2, timeout: float = 300, **variables: str
) -> dict[str, str]:
    """Return, by check of a module, an empty text if all processes passed it, else their tracebacks.

    Args:
        layouts: what the module's `checks` gets beside the folder.
        variables: of the environment of the processes.
    """
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **variables,
    }  # fmt: skip
    logs = [open(folder / f"{rank}.log", "w+") for rank in range(world)]  # noqa: SIM115
    begun = [
        subprocess.Popen(
            [sys.executable, "-m", __name__, module, str(folder), str(rank), str(world), *layouts],
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
        for name, text in (json.loads(report.read_text()) if report.exists() else {}).items():
            found[name] = found.get(name, "") + (f"rank {rank}: {text}\n" if text else "")
        log.seek(0)
        if process.returncode:
            found["end"] = f"rank {rank} ended with {process.returncode}:\n{log.read()[-4000:]}\n" + found.get(
                "end", ""
            )
        log.close()
    return found


def main(module: str, folder: str, rank: int, world: int, *layouts: str) -> None:
    import warnings

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    of_deepspeed = any(layout.startswith("zero") for layout in layouts)  # it wants torch's own store
    store = dict(store=dist.FileStore(os.path.join(folder, "store"), world), rank=rank, world_size=world)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60), **({} if of_deepspeed else store))
    only = os.environ.get("GRAFT_DISTRIBUTED_ONLY", "").split(",")
    done: dict[str, str] = {}
    for name, check in importlib.import_module(module).checks(Path(folder), *layouts):
        if not any(word in name for word in only):
            continue
        try:
            check()
            done[name] = ""
        except Exception:
            done[name] = traceback.format_exc()
        Path(folder, f"{rank}.json").write_text(json.dumps(done))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])
    sys.stdout.flush()
    os._exit(0)  # a thread of gloo that is still there aborts an ordinary exit, now and then
