# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin that runs, in place of the tests, the tests of each change in a process of its own.

A change inside a function is put into a fork of this process, which has collected all tests. Another change, as of a
table, needs the package imported anew: a new Python runs its tests from a changed copy.
"""

from __future__ import annotations

import ast
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.drawn.changes import Change
from tests.drawn.mapping import PACKAGE, ROOT, Record
from tests.drawn.patching import Functions

FINAL = {"failed", "survived", "unpatched", "broken"}  # what a child tells last
HANGS = 60.0  # seconds after which a test hangs
COPIED = 400  # tests that a changed copy runs at most
DECLARED = ("tests/test_surface.py", "tests/golden/test_fields.py")  # read what modules declare


class Runner:
    """Runs the changes and writes a line of JSON for each: the change, and the test that noticed it or null."""

    def __init__(self, changes: Sequence[Change], record: Record, out: Path, budget: float):
        self.changes, self.record, self.out, self.budget = changes, record, out, budget
        self.unreliable: set[str] = set()  # tests that fail without any change
        self.functions: Functions | None = None

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            raise session.Interrupted(f"{session.testsfailed} errors during collection")
        items = {item.nodeid: item for item in session.items}
        self.functions = Functions()  # once, before any fork: a fork that lists all objects copies all memory
        for change in self.changes:
            start = time.monotonic()
            span = span_of_function(change)
            tests = self.record.tests_of(change.file, change.line, span, items)
            noticed_by = self.find_noticing_test(change, tests, items)
            line = {
                "change": str(change), "sort": change.sort, "noticed": noticed_by, "tests": len(tests),
                "seconds": round(time.monotonic() - start, 1),
            }  # fmt: skip
            with self.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
        return True

    def find_noticing_test(self, change: Change, tests: list[str], items: dict[str, pytest.Item]) -> str | None:
        """Return the first test that fails under the change and passes without it; None if no test does in time."""
        while True:
            todo = [test for test in tests if test not in self.unreliable]
            test = self.run_forked(change, [items[t] for t in todo]) if change.function else "no function"
            if test == "no function":
                test = self.run_copy(change, first_tests(change, todo, set(items) - self.unreliable))
            if test not in items or self.run_forked(None, [items[test]]) is None:
                return test
            self.unreliable.add(test)

    def run_forked(self, change: Change | None, items: list[pytest.Item]) -> str | None:
        """Run tests in a fork under a change. Return the test that failed, or None; "no function" if it finds none."""
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            with os.fdopen(write, "w", buffering=1) as pipe:
                try:
                    run_child(change, items, self.functions, self.budget, pipe.write)
                except BaseException as error:
                    pipe.write(f"broken {error!r}\n".replace("\n", " ") + "\n")
                finally:
                    pipe.flush()
                    os._exit(0)
        os.close(write)
        test, verdict = "", ""
        with os.fdopen(read, "rb", buffering=0) as pipe:
            text = b""
            while verdict not in FINAL:
                if not select.select([pipe], [], [], HANGS)[0]:
                    verdict = "failed"
                    break
                if not (more := pipe.read(65536)):
                    verdict = "failed"  # the process died in this test
                    break
                *lines, text = (text + more).split(b"\n")
                for line in lines:
                    verdict, _, name = line.decode().partition(" ")
                    test = name or test
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if verdict == "broken" or (verdict == "failed" and not test):
            raise RuntimeError(f"{change}: the process ended before a test began: {test}")
        return {"failed": test, "unpatched": "no function"}.get(verdict)

    def run_copy(self, change: Change, tests: list[str]) -> str | None:
        """Run the first tests in a new Python from a copy with the change. Return the first that fails, or None."""
        if not tests:
            return None
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, "graft")
            shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
            (copy / change.file).write_text(change.apply((PACKAGE / change.file).read_text()))
            names = Path(folder, "tests")
            names.write_text("\n".join(tests[:COPIED]))
            words = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--rootdir", ROOT, f"@{names}"]
            env = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}
            try:
                done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=4 * self.budget)
            except subprocess.TimeoutExpired:
                return None
            if done.returncode == 0:
                return None
            failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
            return failed[0] if failed else "an import"


def first_tests(change: Change, tests: list[str], collected: set[str]) -> list[str]:
    """Return those of `tests` that run first on a changed copy, before all others: no record has lines of an import.

    These are tests of declarations, whether they run lines of the file or not, and tests in a file named after it.
    """
    own = f"/test_{Path(change.file).stem}.py::"
    first = [test for test in sorted(collected) if test.startswith(DECLARED)] + [test for test in tests if own in test]
    return list(dict.fromkeys([*first, *tests]))


def run_child(
    change: Change | None, items: list[pytest.Item], functions: Functions, budget: float, tell: Callable[[str], object]
) -> None:
    """Run tests under a change until one fails or they took `budget` seconds of this process; tell which."""
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    if change is not None:
        path = PACKAGE / change.file
        if not functions.patch(str(path), path.read_text(), change.apply(path.read_text())):
            tell("unpatched \n")
            return
    start = time.process_time()
    for i, item in enumerate(items):
        if time.process_time() - start > budget:
            break
        tell(f"start {item.nodeid}\n")
        failures: list[str] = []

        class Listener:
            def pytest_runtest_logreport(self, report: pytest.TestReport, failures: list[str] = failures) -> None:
                if report.failed:
                    failures.append(report.nodeid)

        listener = Listener()
        item.config.pluginmanager.register(listener)
        following = items[i + 1] if i + 1 < len(items) else None
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        item.config.pluginmanager.unregister(listener)
        if failures:
            tell(f"failed {item.nodeid}\n")
            return
    tell("survived \n")


def span_of_function(change: Change) -> range:
    """Return the lines of the innermost function around a change; all lines of the file outside functions."""
    tree = ast.parse((PACKAGE / change.file).read_text())
    spans = [
        range(node.body[0].lineno, node.end_lineno + 1)  # type: ignore[operator]
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.lineno <= change.line <= node.end_lineno  # type: ignore[operator]
    ]
    return min(spans, key=len, default=range(1, 1_000_000))
