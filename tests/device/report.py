# SPDX-License-Identifier: Apache-2.0
"""`make device-report`: run the tests of this folder and a short benchmark on a device; write a file to send in.

The file has versions, the device's name, the tests that failed with the first line of each error, and seconds; nothing
of the machine's names, users or paths. Without GRAFT_TESTS_DEVICE the tests run on the simulated device, and no
benchmark.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
import xml.etree.ElementTree as xml
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
PACKAGES = ("graft-adapters", "peft", "torch", "transformers", "accelerate", "safetensors", "numpy", "triton")
TURNS = 20


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "system": platform.system()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return {**found, "cuda": torch.version.cuda, "hip": torch.version.hip}


def driver() -> str | None:
    """Return the version of NVIDIA's driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(asked, capture_output=True, text=True).stdout.split()
    return said[0] if said else None


def device_facts(kind: str | None) -> dict[str, Any]:
    if kind is None:
        return {"type": "cuda, simulated"}
    module: Any = getattr(torch, kind)
    facts: dict[str, Any] = {"type": kind, "available": module.is_available(), "driver": driver()}
    if facts["available"] and kind == "cuda":
        memory = module.get_device_properties(0).total_memory
        facts |= {"name": module.get_device_name(0), "capability": module.get_device_capability(0), "memory": memory}
    if facts["available"] and hasattr(module, "device_count"):
        facts["count"] = module.device_count()
    return facts


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


def calls(lib: Any, device: torch.device, layers: int, tokens: int) -> dict[str, Callable[[], Any]]:
    """What is measured, of graft or PEFT, or of the base alone (None)."""
    from benchmarks.models import WIDTH, lora, randomize, smollm

    x = torch.randn(4, tokens, WIDTH).to(device, torch.bfloat16).requires_grad_()

    def made(**options: Any) -> Any:
        base = smollm(layers, dtype=torch.bfloat16).to(device).requires_grad_(False)
        return base if lib is None else randomize(lib.get_peft_model(base, lora(lib, **options)))

    def forward(model: Any, **options: Any) -> None:
        with torch.no_grad():
            model.eval()(inputs_embeds=x, use_cache=False, **options)

    def step(model: Any) -> None:
        model.zero_grad()
        model.train()(inputs_embeds=x, use_cache=False).last_hidden_state.float().square().mean().backward()

    plain, rows = made(), made()
    if lib is not None:
        for name in "abcd":
            rows.add_adapter(name, lora(lib))
        randomize(rows)
    names = {} if lib is None else {"adapter_names": list("abcd")}
    dora = made(use_dora=True)
    return {
        "forward, LoRA r 16": lambda: forward(plain),
        "training step, LoRA r 16": lambda: step(plain),
        "training step, DoRA r 16": lambda: step(dora),
        "forward, four adapters in a batch": lambda: forward(rows, **names),
    }


def seconds(call: Callable[[], Any], synchronize: Callable[[], Any], turns: int = TURNS) -> float:
    """Return the median of what a call takes on the clock, with all that it has started."""
    taken = []
    for _ in range(turns + 3):
        synchronize()
        began = time.perf_counter()
        call()
        synchronize()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[3:])


def waits(call: Callable[[], Any]) -> int | None:
    """Return how often a call waits for a CUDA device, as torch warns of it; None elsewhere."""
    if not hasattr(torch._C, "_cuda_set_sync_debug_mode"):
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in heard)


def benchmark(device: torch.device, layers: int = 4, tokens: int = 256, turns: int = TURNS) -> dict[str, Any]:
    """Measure graft, PEFT and the base alone: seconds by what is done, and graft's waits."""
    import peft

    import graft

    module = torch.get_device_module(device) if device.type != "cpu" else None
    synchronize = module.synchronize if module is not None else lambda: None
    found: dict[str, Any] = {}
    for name, lib in (("graft", graft), ("PEFT", peft), ("base", None)):
        torch.manual_seed(0)
        for what, call in calls(lib, device, layers, tokens).items():
            row = found.setdefault(what, {})
            row[name] = seconds(call, synchronize, turns)
            if lib is graft:
                row["waits"] = waits(call) if device.type == "cuda" else None
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.device.report", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "device-report.json")
    parser.add_argument("--tests", nargs="+", default=["tests/device"], help="what pytest runs")
    options = parser.parse_args(arguments)
    kind = os.environ.get("GRAFT_TESTS_DEVICE") or None
    facts = device_facts(kind)
    if kind and not facts["available"]:
        print(f"torch finds no device '{kind}' on this machine: nothing was run", file=sys.stderr)
        return 2
    report: dict[str, Any] = {"versions": versions(), "device": facts, "tests": run_tests(kind, options.tests)}
    if kind:
        try:
            report["benchmark"] = benchmark(torch.device(kind, 0))
        except Exception as error:  # a part of the report is better than none
            report["benchmark"] = {"error": f"{type(error).__name__}: {error}"[:500].replace(str(ROOT), "")}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    tests = report["tests"]
    print(f"{tests.get('passed', 0)} tests passed, {len(tests.get('failed', ()))} failed: {options.out}")
    return int(tests["exit"] != 0)


if __name__ == "__main__":
    sys.exit(main())
