# SPDX-License-Identifier: Apache-2.0
"""How many threads an example takes, and how they wait. Settled before torch is loaded, which asks only once.

OpenMP's threads spin while they wait for each other. Where another process has the core of one of them, the others
burn theirs until it comes back, at each of a thousand meetings per step. So threads sleep while they wait, and an
example takes only as many as there are idle cores. What the user has set in the environment stays.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def settle(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set OMP_WAIT_POLICY and OMP_NUM_THREADS where they are not set, for this process and those that it starts.

    Do nothing where torch is loaded already: a program that imports an example keeps its own threads.
    """
    if "torch" in sys.modules:
        return
    environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environ.setdefault("OMP_NUM_THREADS", str(threads(allowed(), os.cpu_count() or 1, load())))


def threads(allowed: int, cores: int, load: float) -> int:
    """Return how many threads find a core of their own.

    Args:
        allowed: cores that this process may use.
        cores: cores of the machine.
        load: how many threads want to run on the whole machine, on average over the last minute.
    """
    return max(1, min(allowed, round(cores - load)))


def allowed() -> int:
    """Return how many cores this process may use: by its affinity, and by its container's quota of processor time."""
    by_affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(by_affinity, int(quota(CGROUP))))


def quota(root: Path) -> float:
    """Return how many cores' worth of time the control group at `root` gives, infinite where it sets no limit."""
    try:
        if (root / "cpu.max").exists():
            limit, period = (root / "cpu.max").read_text().split()
        else:  # the first version of control groups
            limit, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return int(limit) / int(period) if limit not in ("max", "-1") else sys.maxsize
    except (OSError, ValueError):
        return sys.maxsize


def load() -> float:
    """Return the load of the last minute, 0 where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
