# SPDX-License-Identifier: Apache-2.0
"""Threads and processes in which tests run side by side what has to stay apart."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any


def at_once(*work: Callable[[], Any]) -> None:
    """Run functions in a thread each, which Python switches as often as it can; return when all have ended."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=function) for function in work]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(interval)


def start(run: Callable[[], Any]) -> int:
    """Run in a copy of this process, whose exit code is 0 unless `run` raises; return its id."""
    pid = os.fork()
    if not pid:
        try:
            run()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return pid


def in_child(run: Callable[[], Any]) -> int:
    """Run in a copy of this process; return its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(start(run), 0)[1])
