# SPDX-License-Identifier: Apache-2.0
"""Checks that two or more processes run at once: `run` starts them, on a module that has `checks()`.

Each process writes what became of a check into a file of its own, so that one that dies leaves what it found so far.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import socket
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).parents[2]
# a server imports these once, and each process is its fork: imports take longer than most checks
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.tensor.parallel",
                              "transformers.modeling_utils", "graft"])  # fmt: skip


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
    begun = [
        FORKS.Process(target=main, args=(module, str(folder), rank, world, layouts, environment))
        for rank in range(world)
    ]
    for process in begun:
        process.start()
    end = time.monotonic() + timeout
    for process in begun:
        process.join(max(end - time.monotonic(), 0))
    for process in begun:
        process.kill()
        process.join()
    found: dict[str, str] = {}
    for rank, process in enumerate(begun):
        report = folder / f"{rank}.json"
        for name, text in (json.loads(report.read_text()) if report.exists() else {}).items():
            found[name] = found.get(name, "") + (f"rank {rank}: {text}\n" if text else "")
        if process.exitcode:
            log = Path(folder, f"{rank}.log").read_text()[-4000:]
            found["end"] = f"rank {rank} ended with {process.exitcode}:\n{log}\n" + found.get("end", "")
    return found


def main(
    module: str, folder: str, rank: int, world: int, layouts: tuple[str, ...], environment: dict[str, str]
) -> None:
    """Run the checks of one rank in this process, and end it; its output goes into a log."""
    log = os.open(Path(folder, f"{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path not in sys.path]
    code = 1
    try:
        run_checks(module, folder, rank, world, *layouts)
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a thread of gloo that is still there aborts an ordinary exit, now and then


def run_checks(module: str, folder: str, rank: int, world: int, *layouts: str) -> None:
    import warnings

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
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
