# SPDX-License-Identifier: Apache-2.0
"""`make device-report`: the document of `graft device-report`, and the results of the tests of this folder.

The file names the tests that failed, with the first line of each error; nothing of the machine's names, users or paths.
Without GRAFT_TESTS_DEVICE the tests run on the simulated device, and the file has their results alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from pathlib import Path
from typing import Any

from graft.command.device_checks import build_report, find_device

ROOT = Path(__file__).parents[2]


def run_tests(kind: str | None, what: list[str]) -> dict[str, Any]:
    """Run pytest; return counts, and what failed."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        plugin = [] if kind else ["-p", "tests.device.simulated"]
        command = [sys.executable, "-m", "pytest", *plugin, *what, "-o", "junit_family=xunit1", f"--junitxml={results}"]
        done = subprocess.run(command, cwd=ROOT)
        suite = xml.parse(results).getroot().find("testsuite") if results.exists() else None
    if suite is None:
        return {"exit": done.returncode, "error": "pytest wrote no results"}
    failed, skipped = {}, {}
    for case in suite.iter("testcase"):
        name = f"{Path(case.get('file', '')).name}::{case.get('name')}"
        for kind_of, into in (("failure", failed), ("error", failed), ("skipped", skipped)):
            found = case.find(kind_of)
            if found is not None:
                into[name] = next(iter(found.get("message", "").splitlines()), "")[:300].replace(str(ROOT), "")
    total = int(suite.get("tests", 0))
    return {
        "exit": done.returncode,
        "passed": total - len(failed) - len(skipped),
        "failed": failed,
        "skipped": sorted({*skipped.values()}),
        "skipped_tests": len(skipped),
        "seconds": float(suite.get("time", 0)),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.device.report", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "device-report.json")
    parser.add_argument("--tests", nargs="+", default=["tests/device"], help="what pytest runs")
    options = parser.parse_args(arguments)
    kind = os.environ.get("GRAFT_TESTS_DEVICE") or None
    device = find_device(kind) if kind else None
    if kind and device is None:
        print(f"torch finds no device '{kind}' on this machine: nothing was run", file=sys.stderr)
        return 3
    report = build_report(device, print) if device else {"device": {"type": "cuda, simulated"}}
    report["tests"] = run_tests(kind, options.tests)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    tests = report["tests"]
    print(f"{tests.get('passed', 0)} tests passed, {len(tests.get('failed', ()))} failed: {options.out}")
    return int(tests["exit"] != 0 or bool(report.get("checks", {}).get("failed")))


if __name__ == "__main__":
    sys.exit(main())
