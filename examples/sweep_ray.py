# SPDX-License-Identifier: Apache-2.0
"""The sweep of `examples/sweep.py` on Ray: each worker trains a share of the settings in one bank of adapters.

    pip install ray
    python examples/sweep_ray.py --workers 2

On a cluster, `ray.init(address="auto")` finds its machines; workers meet only to compare losses on each rung.
"""

import argparse
import asyncio
from collections.abc import Sequence
from typing import Any

import ray
import torch

import graft
from examples.sweep import load, settings

Rows = list[dict[str, Any]]


@ray.remote
class Meeting:
    """Where workers learn from each other what became of their settings."""

    def __init__(self, workers: int):
        self.workers, self.held, self.full = workers, list[Rows](), asyncio.Event()

    async def exchange(self, rows: Rows) -> list[Rows]:
        held, full = self.held, self.full
        held.append(rows)
        if len(held) == self.workers:
            self.held, self.full = [], asyncio.Event()
            full.set()
        await full.wait()
        return held


@ray.remote(num_cpus=1)
def share(number: int, workers: int, meeting: Any, quick: bool, out: str) -> Rows:
    torch.set_num_threads(1)  # another number of threads may round otherwise
    exchange = lambda rows: ray.get(meeting.exchange.remote(rows))
    return graft.sweep(load(), **settings(quick, out), share=(number, workers), exchange=exchange).rows


def main(argv: Sequence[str] | None = None) -> Rows:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", default="out/sweep-ray", help="folder that all workers see")
    parser.add_argument("--quick", action="store_true", help="a few steps")
    args = parser.parse_args(argv)
    ray.init(ignore_reinit_error=True)
    meeting = Meeting.remote(args.workers)
    work = [share.remote(i, args.workers, meeting, args.quick, args.out) for i in range(args.workers)]
    tables = ray.get(work)
    assert all(table == tables[0] for table in tables)
    for row in tables[0]:
        print(row)
    return tables[0]


if __name__ == "__main__":
    main()
