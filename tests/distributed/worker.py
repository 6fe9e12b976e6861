# SPDX-License-Identifier: Apache-2.0
"""One process of the distributed checks: `python -m tests.distributed.worker FOLDER RANK WORLD LAYOUT…`.

It writes what became of each check into a file of its own, so that a process that dies leaves what it found so far.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from datetime import timedelta


def main(folder: str, rank: int, world: int, layouts: list[str]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = dist.FileStore(os.path.join(folder, "store"), world) if not layouts[0].startswith("zero") else None
    if store is None:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    else:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    from tests.distributed.checks import checks_of

    only = os.environ.get("GRAFT_DISTRIBUTED_ONLY", "").split()
    done: dict[str, str] = {}
    for layout in layouts:
        for name, check in checks_of(layout):
            if only and not any(word in name for word in only):
                continue
            try:
                check(folder)
                done[name] = ""
            except Exception:
                done[name] = traceback.format_exc()
            with open(os.path.join(folder, f"{rank}.json"), "w") as f:
                json.dump(done, f)
            dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    sys.stdout.flush()
    os._exit(0)  # a thread of gloo that is still there aborts an ordinary exit, now and then
