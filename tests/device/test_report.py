# SPDX-License-Identifier: Apache-2.0
"""The report on a device that `make device-report` writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.device import report

ROOT = Path(__file__).parents[2]
FAILING = """
import pytest


def test_one():
    assert False, "a reason"


@pytest.mark.skip(reason="not now")
def test_two():
    pass


def test_three():
    pass
"""


def written(folder, *tests, **environment):
    file = folder / "report.json"
    code = [sys.executable, "-m", "tests.device.report", "--out", str(file), "--tests", *map(str, tests)]
    there = {k: v for k, v in os.environ.items() if k != "GRAFT_TESTS_DEVICE"} | environment
    done = subprocess.run(code, cwd=ROOT, env=there, capture_output=True, text=True)
    return done, json.loads(file.read_text()) if file.exists() else None


def test_a_report_names_what_failed(tmp_path):
    (tmp_path / "test_some.py").write_text(FAILING)
    done, found = written(tmp_path, tmp_path / "test_some.py")
    assert done.returncode == 1, done.stderr
    assert found["device"] == {"type": "cuda, simulated"} and "benchmark" not in found
    assert found["versions"]["torch"] == torch.__version__
    tests = found["tests"]
    assert (tests["passed"], tests["skipped"], tests["skipped_tests"]) == (1, ["not now"], 1)
    ((name, text),) = tests["failed"].items()
    assert name == "test_some.py::test_one" and "a reason" in text and str(tmp_path) not in json.dumps(found)


@pytest.mark.skipif(torch.xpu.is_available(), reason="the device is there")
def test_a_device_that_is_not_there(tmp_path):
    done, found = written(tmp_path, tmp_path, GRAFT_TESTS_DEVICE="xpu")
    assert done.returncode == 2 and "no device 'xpu'" in done.stderr and found is None


@pytest.mark.filterwarnings("ignore:::peft")
def test_the_benchmark_measures_all_three():
    found = report.benchmark(torch.device("cpu"), layers=1, tokens=4, turns=1)
    assert len(found) == 4
    for row in found.values():
        assert row["waits"] is None and all(row[who] > 0 for who in ("graft", "PEFT", "base"))
