# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin that records which lines of graft each test runs and its CPU time; and a reader of the record.

It is loaded by `-p tests.drawn.mapping`, so that it measures from before the first import of graft.
"""

from __future__ import annotations

import json
import os
import sqlite3
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import coverage
import pytest
from coverage.numbits import numbits_to_nums

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "graft"
FOLDER = "GRAFT_DRAWN_RECORD"  # the variable that names the folder of the record
SILENT = ["module-not-measured", "module-not-imported", "already-imported", "no-data-collected"]
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "main")

times: dict[str, float] = {}
tracer: coverage.Coverage | None = None

if FOLDER in os.environ and (WORKER != "main" or "-n" not in sys.argv):  # not in the process that only gives out tests
    tracer = coverage.Coverage(
        data_file=str(Path(os.environ[FOLDER], f"lines-{WORKER}")), source=[str(PACKAGE)], config_file=False
    )
    tracer.set_option("run:disable_warnings", SILENT)
    tracer.start()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if tracer is None:
        return (yield)
    tracer.switch_context(item.nodeid)
    start = time.process_time()
    try:
        return (yield)
    finally:
        times[item.nodeid] = round(time.process_time() - start, 4)


def pytest_unconfigure() -> None:
    if tracer is not None:
        tracer.stop()
        tracer.save()
        Path(os.environ[FOLDER], f"times-{WORKER}.json").write_text(json.dumps(times))


class Record:
    """What was recorded in a folder."""

    def __init__(self, folder: Path):
        self.times: dict[str, float] = {}
        for path in sorted(folder.glob("times-*.json")):
            self.times |= json.loads(path.read_text())
        self.databases = [sqlite3.connect(path) for path in sorted(folder.glob("lines-*")) if path.suffix == ""]
        self._lines: dict[str, dict[str, set[int]]] = {}

    def lines_by_test(self, file: str) -> dict[str, set[int]]:
        """Return the lines of a file of the package that each test runs."""
        if file not in self._lines:
            lines: dict[str, set[int]] = {}
            for database in self.databases:
                rows = database.execute(
                    "select context.context, line_bits.numbits from line_bits"
                    " join context on context.id = line_bits.context_id"
                    " join file on file.id = line_bits.file_id where file.path like ?",
                    (f"%/src/graft/{file}",),
                )
                for test, bits in rows:
                    if test:
                        lines.setdefault(test, set()).update(numbits_to_nums(bits))
            self._lines[file] = lines
        return self._lines[file]

    def tests_of(self, file: str, line: int, span: range, tests: Iterable[str]) -> list[str]:
        """Return those of `tests` that run a line, the fastest first; any line of `span` if none runs it.

        Tests that were not recorded follow: those whose functions have a recorded test that runs the line, then those
        whose functions have one that runs any line of the file.
        """
        lines = self.lines_by_test(file)
        near = {test for test, ran in lines.items() if line in ran}
        near = near or {test for test, ran in lines.items() if any(n in ran for n in span)}
        functions = [{test.partition("[")[0] for test in some} for some in (near, lines)]
        means = self.mean_times()
        ranks: dict[str, tuple[int, float]] = {}
        for test in tests:
            function = test.partition("[")[0]
            if test in self.times:
                if test in near:
                    ranks[test] = 0, self.times[test]
            elif function in functions[1]:
                ranks[test] = 1 + (function not in functions[0]), means[function]
        return sorted(ranks, key=ranks.__getitem__)

    def mean_times(self) -> dict[str, float]:
        """Return the mean time of the recorded tests of each function."""
        times: dict[str, list[float]] = {}
        for test, seconds in self.times.items():
            times.setdefault(test.partition("[")[0], []).append(seconds)
        return {function: sum(some) / len(some) for function, some in times.items()}
