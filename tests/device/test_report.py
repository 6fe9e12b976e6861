# SPDX-License-Identifier: Apache-2.0
"""The reports on a device: that of `graft device-report`, and that of `make device-report` with results of tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import graft
from graft.command import app, device_checks
from tests.device import simulated

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
    assert found["device"] == {"type": "cuda, simulated"} and "checks" not in found
    tests = found["tests"]
    assert (tests["passed"], tests["skipped"], tests["skipped_tests"]) == (1, ["not now"], 1)
    ((name, text),) = tests["failed"].items()
    assert name == "test_some.py::test_one" and "a reason" in text and str(tmp_path) not in json.dumps(found)


@pytest.mark.skipif(torch.xpu.is_available(), reason="the device is there")
def test_a_device_that_is_not_there(tmp_path):
    done, found = written(tmp_path, tmp_path, GRAFT_TESTS_DEVICE="xpu")
    assert done.returncode == 3 and "no device 'xpu'" in done.stderr and found is None


@pytest.mark.skipif(simulated.WHY_NOT is not None, reason="only the simulated device tells of waits")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["LORA", "OSF", "FOURIERFT", "MOELORA", "FINEGATES", "VBLORA"])
def test_the_step_that_is_counted_waits_nowhere(method, monkeypatch, tmp_path):
    """The steps before it copy constants, audit gradients, and look at VB-LoRA's new logits."""

    def set_mode(mode):
        simulated.WAITS.on = "it" if mode == "warn" else None

    monkeypatch.setattr(torch._C, "_cuda_set_sync_debug_mode", None, raising=False)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    config = device_checks.METHODS[method](target_modules=["up", "down"])
    device_checks.randomize_adapters(graft.get_peft_model(device_checks.build_base(), config)).save_pretrained(tmp_path)
    model, x = device_checks.load_model(str(tmp_path), torch.device("cuda", 0)), torch.randn(8, 256).to("cuda")
    simulated.WAITS.found.clear()
    device_checks.count_step_waits(model, x)
    assert not simulated.WAITS.found


@pytest.mark.filterwarnings("ignore")  # PEFT's, of names and of a tied prefix
def test_the_command_checks_and_measures_on_a_device(tmp_path, monkeypatch, capsys):
    """Each law is compared in each dtype; a law that computes something else on the device is named."""
    monkeypatch.setattr(device_checks, "METHODS", {n: device_checks.METHODS[n] for n in ("LORA", "OFT", "LILY")})
    monkeypatch.setattr(device_checks.run_benchmark, "__defaults__", (64, 4, 1))
    monkeypatch.setattr(sys, "argv", ["graft", "device-report", "-o", str(tmp_path / "r.json")])
    with pytest.raises(SystemExit) as left:
        app.main()
    written = json.loads((tmp_path / "r.json").read_text())
    assert not left.value.code, written["checks"]["failed"]
    assert written["device"]["type"] == (os.environ.get("GRAFT_TESTS_DEVICE") or "cuda")
    checks = written["checks"]
    assert checks["passed"] == 3 * (5 + 4 + 4) - 3 and len(checks["deviations"]) == 13
    assert checks["skipped"].keys() == {f"LILY merge {dtype}" for dtype in ("float32", "bfloat16", "float16")}
    assert 0 < checks["deviations"]["backward float32"] < 1e-4
    assert len(written["benchmark"]) == 4
    assert all(
        row.keys() == {"graft", "PEFT", "base"} and min(row.values()) > 0 for row in written["benchmark"].values()
    )
    assert "LORA" not in capsys.readouterr().err and str(tmp_path) not in (tmp_path / "r.json").read_text()
