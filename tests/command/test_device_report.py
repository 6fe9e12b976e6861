# SPDX-License-Identifier: Apache-2.0
"""`graft device-report` on a machine without a device: its plan; on the CPU itself: its checks can fail."""

import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

import graft
from graft.command import device_checks

CPU = torch.device("cpu")


def check(monkeypatch, *methods):
    """Check some methods on the CPU."""
    monkeypatch.setattr(device_checks, "METHODS", {name: device_checks.METHODS[name] for name in methods})
    return device_checks.check_device(CPU, lambda _: None)


def load(folder, dtype=torch.float32):
    """A model of the checks, with a LoRA."""
    config = graft.LoraConfig(target_modules=["up", "down"])
    device_checks.randomize_adapters(graft.get_peft_model(device_checks.build_base(), config)).save_pretrained(folder)
    return device_checks.load_model(str(folder), CPU, dtype)


@pytest.mark.skipif(torch.xpu.is_available(), reason="the device is there")
def test_without_a_device_it_says_its_plan(tmp_path):
    command = [sys.executable, "-m", "graft", "device-report", "--device", "xpu"]
    done = subprocess.run([*command, "--json"], cwd=tmp_path, capture_output=True, text=True)
    document = json.loads(done.stdout)
    assert done.returncode == 3 and document["device"] is None
    assert "torch finds no xpu" in document["plan"] and "43 methods" in document["plan"]
    assert os.listdir(tmp_path) == []


def test_the_file_of_a_report(tmp_path, monkeypatch, run):
    """It is not replaced without --force, and a failed check is exit code 1."""
    monkeypatch.setattr(device_checks, "METHODS", {"LORA": device_checks.METHODS["LORA"]})
    words = "device-report", "--device", "cpu", "-o", tmp_path / "r.json"
    monkeypatch.setattr(device_checks, "TOLERANCES", {torch.float32: 1e-4})
    monkeypatch.setattr(device_checks, "LAWS", (device_checks.run_forward, fail))
    code, said, _ = run(*words)
    assert code == 1 and "1 checks passed, 1 failed" in said and "LORA fail float32: ValueError: no" in said
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["versions"]["torch"] == version("torch") and report["versions"]["graft-adapters"]
    assert report["device"]["type"] == "cpu" and report["benchmark"] == {}
    code, _, said = run(*words)
    assert code == 2 and "exists" in said


calls = []


def fail(model, x):
    """Raise on the device only: the second time that the law is asked."""
    calls.append(model)
    if len(calls) % 2 == 0:
        raise ValueError(f"no {os.path.expanduser('~')}/secret")
    return [x]


def test_errors_name_no_folders():
    text = device_checks.shorten_error(ValueError(f"in {os.path.expanduser('~')}/a\nsecond line"))
    assert text == "ValueError: in …/a"


def test_a_wrong_result_fails(monkeypatch):
    """Each kind of deviation is seen: another value, NaN, fewer tensors."""
    results = []
    for turn in (lambda y: y * 1.001, lambda y: y * float("nan"), lambda y: y[:1]):
        count = iter(range(10))
        law = lambda model, x, count=count, turn=turn: [turn(x) if next(count) % 2 else x]
        law.__name__ = "run_law"
        monkeypatch.setattr(device_checks, "LAWS", (law,))
        monkeypatch.setattr(device_checks, "TOLERANCES", {torch.float32: 1e-4})
        results.append(check(monkeypatch, "LORA"))
    assert [(r["passed"], [*r["failed"]]) for r in results] == [(0, ["LORA law float32"])] * 3
    assert "0.001" in results[0]["failed"]["LORA law float32"] and "nan" in results[1]["failed"]["LORA law float32"]


def test_weights_that_unmerging_does_not_restore_fail(tmp_path):
    model, x = load(tmp_path, torch.bfloat16), torch.randn(8, 256).bfloat16()
    device_checks.run_merge(model, x)
    model.unmerge_adapter = lambda: None
    with pytest.raises(AssertionError, match="does not restore the bits"):
        device_checks.run_merge(model, x)


def test_a_law_that_the_cpu_breaks_fails(monkeypatch):
    """One that it refuses is skipped."""

    def run_law(model, x):
        raise error

    monkeypatch.setattr(device_checks, "LAWS", (run_law,))
    monkeypatch.setattr(device_checks, "TOLERANCES", {torch.float32: 1e-4})
    error = NotImplementedError("no merge")
    assert check(monkeypatch, "LORA")["skipped"] == {"LORA law float32": "NotImplementedError: no merge"}
    error = AssertionError("not restored")
    assert check(monkeypatch, "LORA")["failed"] == {"LORA law float32": "AssertionError: not restored"}


@pytest.mark.parametrize("error, where", [(ImportError("no sklearn"), "skipped"), (ValueError("no"), "failed")])
def test_a_method_that_cannot_be_made(monkeypatch, error, where):
    def make_config(**options):
        raise error

    monkeypatch.setattr(device_checks, "METHODS", {"ADAMSS": make_config})
    results = device_checks.check_device(CPU, lambda _: None)
    assert results[where] == {"ADAMSS": f"{type(error).__name__}: {error}"} and results["passed"] == 0


def test_a_step_that_waits_fails(monkeypatch):
    monkeypatch.setattr(device_checks, "count_step_waits", lambda model, x: 2)
    monkeypatch.setattr(device_checks, "LAWS", ())
    results = check(monkeypatch, "LORA")
    assert results["failed"] == {"LORA": "AssertionError: A training step waits 2 times for the device."}


def test_every_method_is_checked_or_left_out_by_name():
    known = {kind.value for kind in graft.PeftType}
    assert known == {*device_checks.METHODS, *device_checks.LEFT_OUT} and len(device_checks.METHODS) == 43


@pytest.mark.slow
def test_every_method_keeps_the_laws_on_the_cpu(monkeypatch):
    if os.environ.get("GRAFT_TESTS") != "all":
        monkeypatch.setattr(device_checks, "TOLERANCES", {torch.float32: 1e-4})
    results = check(monkeypatch, *device_checks.METHODS)
    assert results["failed"] == {}
    unmergeable = {"LILY", "BOTTLENECK", "REFT", "STEERING", "EWORA", "MOELORA"}
    assert {name.split()[0] for name in results["skipped"]} == unmergeable
    assert results["passed"] + len(results["skipped"]) == 43 * len(results["deviations"])


def test_an_adapter_of_the_checks_changes_the_output(tmp_path):
    """Else a device that leaves it out would pass."""
    model, x = load(tmp_path), torch.randn(8, 256)
    with_adapter, without, mixed = device_checks.run_forward(model, x)
    assert (with_adapter - without).norm() > 0.05 * without.norm()
    assert torch.equal(mixed[1::2], without[1::2]) and not torch.equal(mixed[::2], without[::2])
