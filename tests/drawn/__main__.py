# SPDX-License-Identifier: Apache-2.0
"""Draw changes of the package and say which of them the tests notice.

python -m tests.drawn --record                 record which lines each default test runs: as long as two `make test`
python -m tests.drawn --record --quick         those of `make quick` alone: in two minutes, and nearly as good
python -m tests.drawn --seed 1 --n 100         100 changes against the default tests
python -m tests.drawn --seed 1 --survivors     those that a run with --quick did not notice, against the default tests
python -m tests.drawn --seed 1 --n 100 --quick the same against the tests of `make quick`
python -m tests.drawn --seed 1 --device        those that a run without --quick did not notice, on a simulated device;
                                               prints the share that both noticed
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.drawn.changes import draw_changes
from tests.drawn.mapping import FOLDER, PACKAGE, ROOT, Record

FOLDERS = ["core", "methods", "inject", "io", "kernels"]
OUT = ROOT / "out" / "drawn"
DEFAULT = ["-m", "not slow", "--ignore=tests/distributed", "--ignore=tests/device"]
DEVICE = ["-p", "tests.device.simulated", "tests/device"]  # `make test` runs these, too


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--survivors", action="store_true")
    parser.add_argument("--device", action="store_true")
    parser.add_argument("--folders", nargs="+", default=FOLDERS)
    parser.add_argument(
        "--budget", type=float, default=120, help="seconds of the processor that the tests of one change take"
    )
    parser.add_argument("--show", action="store_true", help="print the changes alone")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.record:
        sys.exit(record_lines(options.quick))
    changes = draw_changes(PACKAGE, options.folders, options.seed, options.n)
    if options.show:
        print(*changes, sep="\n")
    elif options.part:
        i = int(options.part)
        if options.survivors or options.device:
            before = "all" if options.device else "quick"
            survivors = {row["change"] for row in read_results(options.seed, before) if not row["noticed"]}
            changes = [change for change in changes if str(change) in survivors]
        run_changes(changes[i::2], results_file(options.seed, name_tests(options), i), options.budget, options.device)
    else:
        run_parts(options)


def name_tests(options: argparse.Namespace) -> str:
    """Return the name of the tests that run: "quick", "device" or "all"."""
    return "quick" if options.quick else "device" if options.device else "all"


def results_file(seed: int, tests: str, part: int) -> Path:
    return OUT / f"results-{tests}-{seed}-{part}.jsonl"


def read_results(seed: int, tests: str) -> list[dict]:
    """Return a row for each change that was run: its `noticed` is the test that noticed it, or None."""
    files = [results_file(seed, tests, i) for i in range(2)]
    return [json.loads(line) for file in files if file.exists() for line in file.read_text().splitlines()]


def record_lines(quick: bool) -> int:
    """Run the default tests, or those of `make quick`, under the recorder and return pytest's exit code.

    Its output goes into a file, which the last line printed names.
    """
    OUT.mkdir(parents=True, exist_ok=True)
    for path in [*OUT.glob("lines-*"), *OUT.glob("times-*")]:
        path.unlink()
    env = {**os.environ, FOLDER: str(OUT)} | ({"GRAFT_TESTS": "quick"} if quick else {})
    words = [sys.executable, "-m", "pytest", "-p", "tests.drawn.mapping"]
    runs = [["-n", "2", *DEFAULT]] if quick else [["-n", "2", *DEFAULT], DEVICE]
    with Path(OUT, "log-record").open("w") as log:
        codes = [subprocess.run([*words, *run], cwd=ROOT, env=env, stdout=log, stderr=log).returncode for run in runs]
    print(f"recorded, with pytest's exit codes {codes}; its output is in {log.name}")
    return max(codes)


def run_changes(changes: list, out: Path, budget: float, device: bool = False) -> None:
    """Run changes against the tests that pytest collects in this process: those on a simulated device, or others."""
    import pytest

    from tests.drawn.runner import Runner

    record = Record(OUT)
    if not record.times:
        raise SystemExit("nothing is recorded: run python -m tests.drawn --record first")
    pytest.main(
        ["-p", "no:cacheprovider", *(DEVICE if device else DEFAULT)], plugins=[Runner(changes, record, out, budget)]
    )


def run_parts(options: argparse.Namespace) -> None:
    """Run two halves of the changes in two processes and print the result."""
    env = {**os.environ, "GRAFT_TESTS": "quick"} if options.quick else None
    processes = []
    for i in range(2):
        results_file(options.seed, name_tests(options), i).unlink(missing_ok=True)
        words = [sys.executable, "-m", "tests.drawn", *sys.argv[1:], "--part", str(i)]
        with Path(OUT, f"log-{i}").open("w") as log:
            processes.append(subprocess.Popen(words, cwd=ROOT, env=env, stdout=log, stderr=log))
    for process in processes:
        process.wait()
    rows = read_results(options.seed, name_tests(options))
    survivors = [row for row in rows if row["noticed"] is None]
    for row in survivors:
        print(f"survives {row['tests']:5} tests, {row['seconds']:5} s: {row['change']}")
    print(collections.Counter(row["sort"] for row in survivors))
    before = read_results(options.seed, "all") if options.device else rows
    print(f"{len(before) - len(survivors)} of {len(before)} changes noticed")


if __name__ == "__main__":
    main()
