# SPDX-License-Identifier: Apache-2.0
"""The tests of this folder at length: `python -m tests.trust.campaign [kills] [rounds]`. Prints all outcomes and
fails if one is bad.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.trust.folders import CARD, CONFIG, adapter, held

NUMBERS = [1, 2, 3, 4]
WHOLE = {(n, n) for n in NUMBERS}
GOOD = ("whole", "read beside: whole", "writers without an error", "clean after the next save")


def save(folder: Path, number: int, safe: bool) -> None:
    adapter(number).save_pretrained(folder, safe_serialization=safe)


def start(run) -> int:
    pid = os.fork()
    if not pid:
        os._exit(run() or 0)
    return pid


def saving(folder: Path, numbers: list[int], formats: list[bool], rounds: int, begin: float):
    """Return what a process does: saves of random adapters in random formats, with the exit code 1 after an error."""

    def run() -> int:
        dice = random.Random(os.getpid())
        time.sleep(max(0, begin - time.monotonic()))
        try:
            for _ in range(rounds):
                save(folder, dice.choice(numbers), dice.choice(formats))
        except BaseException as e:
            print(f"a writer failed: {type(e).__name__}: {e}", flush=True)
            return 1
        return 0

    return run


def result(folder: Path) -> str:
    try:
        found = held(folder)
    except BaseException as e:
        return f"{type(e).__name__}: {e}"
    return "whole" if found in WHOLE else f"alpha {found[0]}, values {found[1]}"


def kills(folder: Path, times: int, together: int, formats: list[bool]) -> Counter:
    """Kill processes that save, at random times; look at the folder, and at what the next save leaves."""
    ended: Counter = Counter()
    for _ in range(times):
        begin = time.monotonic() + 0.02
        pids = [start(saving(folder, NUMBERS, formats, 1000, begin)) for _ in range(together)]
        time.sleep(max(0, begin - time.monotonic()) + random.random() * 0.05)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)
        ended[result(folder)] += 1
        if random.random() < 0.2:
            save(folder, 1, formats[0])
            names = {n for n in os.listdir(folder) if n not in (CONFIG, CARD) and not n.startswith("adapter_model.")}
            ended[f"litter after the next save: {sorted(names)}" if names else "clean after the next save"] += 1
    return ended


def races(folder: Path, rounds: int, writers: int, formats: list[bool], same: bool) -> Counter:
    """Let processes save at once while this one reads."""
    ended: Counter = Counter()
    for _ in range(rounds):
        begin = time.monotonic() + 0.02
        numbers = [[1] if same else [n] for n in NUMBERS[:writers]]
        running = {start(saving(folder, n, formats, 3, begin)) for n in numbers}
        while running:
            ended[f"read beside: {result(folder)}"] += 1
            for pid in list(running):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    running.remove(pid)
                    ended["writers that failed" if status else "writers without an error"] += 1
        ended[result(folder)] += 1
    return ended


def main(times: int = 500, rounds: int = 200) -> bool:
    """Return True if every folder was whole, every writer ended well and no save left files behind."""
    root = Path(tempfile.mkdtemp())
    for number in NUMBERS:
        save(root / "0", number, True)  # imports what a first save imports
    plans = {"safetensors": [True], "bin": [False], "both": [True, False]}
    seen: Counter = Counter()
    try:
        for name, formats in plans.items():
            for together in (1, 3):
                seen += tell(f"kills, {together} at once, {name}", kills(root / "0", times, together, formats))
            for writers in (2, 4):
                for same in (True, False):
                    text = f"races of {writers}, {'the same adapter' if same else 'different ones'}, {name}"
                    seen += tell(text, races(root / "0", rounds, writers, formats, same))
    finally:
        shutil.rmtree(root, ignore_errors=True)
    bad = seen.total() - sum(seen[outcome] for outcome in GOOD)
    print(f"{seen['whole']:,} folders whole after kills and races, {seen['read beside: whole']:,} beside; {bad} faults")
    return bad == 0


def tell(text: str, outcomes: Counter) -> Counter:
    """Print outcomes and return them."""
    print(f"{text}: {dict(outcomes)}", flush=True)
    return outcomes


if __name__ == "__main__":
    sys.exit(not main(*map(int, sys.argv[1:])))
