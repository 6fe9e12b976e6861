# SPDX-License-Identifier: Apache-2.0
"""The same scenario with graft under PEFT's name and with PEFT, each in a process of its own.

A file of tests holds scenarios: functions that use a client and return what they found. `scenario` makes a test of
one. The first test of a file starts two processes, which run all its selected scenarios (`side.py`): importing a
client takes longer than most scenarios. Imports of clients stand in the functions, so that pytest reads these files
where no client is installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
LIBRARIES = ("graft", "peft")
TIMEOUT = 600  # seconds for one scenario, imports included, on a busy machine
SHOWN = 20  # of the differences


def scenario(function: Callable[[Path], dict] | None = None, *, tolerance: float = 1e-5) -> Any:
    """Make a test of a function that takes an empty folder and returns what it found, by name."""

    def decorate(function: Callable[[Path], dict]) -> Any:
        def test(pair: Pair) -> None:
            ours, theirs = (pair.found(library, function.__name__) for library in LIBRARIES)
            errors = [f"With {lib}: {text}" for lib, text in zip(LIBRARIES, (ours, theirs)) if isinstance(text, str)]
            differences = errors or list(compare(ours, theirs, tolerance))
            if differences:
                head = f"graft differs from PEFT: {len(differences)} differences, of which the first are"
                pytest.fail("\n".join([head, *differences[:SHOWN]]), pytrace=False)

        test.__name__, test.__doc__, test.__module__ = function.__name__, function.__doc__, function.__module__
        test.scenario = function  # type: ignore[attr-defined]
        return test

    return decorate if function is None else decorate(function)


def compare(ours: Any, theirs: Any, tolerance: float, where: str = "") -> Any:
    """Yield a line for each difference. Numbers and tensors may differ by the tolerance, relative or absolute."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted({*ours, *theirs}, key=str):
            if key not in ours or key not in theirs:
                yield f"{where}{key}: only with {'PEFT' if key in theirs else 'graft'}"
            else:
                yield from compare(ours[key], theirs[key], tolerance, f"{where}{key}: ")
    elif isinstance(theirs, (list, tuple)) and isinstance(ours, (list, tuple)) and len(ours) == len(theirs):
        for i, pair in enumerate(zip(ours, theirs)):
            yield from compare(*pair, tolerance, f"{where}[{i}] ")
    elif isinstance(theirs, (float, torch.Tensor)) and isinstance(ours, type(theirs)):
        try:
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=False)
        except AssertionError as e:
            yield where + str(e).replace("\n", " ")
    elif type(ours) is not type(theirs) or ours != theirs:
        yield f"{where}{ours!r} with graft, {theirs!r} with PEFT"


class Pair:
    """Two processes that run scenarios of a module one after the other, and what they found so far."""

    def __init__(self, module: str, names: list[str], folder: Path):
        self.folder = folder
        self.processes, self.logs = {}, {}
        for library in LIBRARIES:
            place = folder / library
            place.mkdir()
            self.logs[library] = open(place / "log", "w")  # noqa: SIM115
            self.processes[library] = subprocess.Popen(
                [sys.executable, "-m", "tests.clients.side", library, module, str(place), *names],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(place / "cache"), **OFFLINE},
                stdout=self.logs[library],
                stderr=subprocess.STDOUT,
            )

    def found(self, library: str, name: str) -> dict | str:
        """Wait for what a scenario found, or for its traceback, or for the end of its process."""
        result, process = self.folder / library / f"{name}.pt", self.processes[library]
        end = time.monotonic() + TIMEOUT
        while not result.exists():
            if process.poll() is not None and not result.exists():
                return f"the process ended with {process.returncode}:\n{self.log(library)}"
            if time.monotonic() > end:
                return f"no result within {TIMEOUT} s:\n{self.log(library)}"
            time.sleep(0.2)
        return torch.load(result, weights_only=True)

    def log(self, library: str) -> str:
        return (self.folder / library / "log").read_text()[-4000:]

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()
        for log in self.logs.values():
            log.close()


OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
