# SPDX-License-Identifier: Apache-2.0
"""What pytest needs to run PEFT's tests offline, and to tell what became of each: `-p plugin`, in every process.

Names of PEFT's inside that graft lacks stand in as placeholders while a test module is imported, so that only the tests
that use them fail. The data sets that tests load are made here. Every test begins with the same random state.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import random
import sys
import types
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

OUT = Path(os.environ["PEFT_SUITE_OUT"])
PART = int(os.environ.get("PEFT_SUITE_PART", 1))  # one test of so many
ONLY = os.environ.get("PEFT_SUITE_ONLY")  # a file of tests' names

# ---------------------------------------------------------------------------------------------------- names


class MissingName(Exception):
    """A test uses a name that graft lacks."""


used: list[str] = []  # by the test that runs, also where it swallowed the error
running = False


class Placeholder(type):
    """A class that can be imported, listed and asked for by isinstance, and fails when it is used."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        cls.fail()

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if running:
            cls.fail()
        return super().__call__()

    def fail(cls) -> None:
        used.append(f"{cls.__module__}.{cls.__name__} is missing")
        raise MissingName(used[-1])


def imported(source: str) -> Iterator[tuple[str, str]]:
    """What a test module imports from PEFT when it is imported: modules and names."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "peft":
            yield from ((node.module or "", a.name) for a in node.names)
        elif isinstance(node, ast.Import):
            yield from ((a.name, "") for a in node.names if a.name.startswith("peft."))


def fill(source: str) -> list[tuple[types.ModuleType, str]]:
    """Put placeholders where graft has nothing. Returns where."""
    filled = []
    for module, name in imported(source):
        try:
            holder = importlib.import_module(module)
        except ImportError:
            holder = sys.modules[module] = types.ModuleType(module)
            parent, _, last = module.rpartition(".")
            vars(importlib.import_module(parent))[last] = holder
        if name and not hasattr(holder, name):
            vars(holder)[name] = Placeholder(name, (), {"__module__": module})
            filled.append((holder, name))
    return filled


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    filled = fill(collector.path.read_text()) if isinstance(collector, pytest.Module) else []
    try:
        return (yield)
    finally:
        for holder, name in filled:
            vars(holder).pop(name, None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    global running
    used.clear()
    running = True
    try:
        return (yield)
    finally:
        running = False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    if used and report.when == "call" and report.passed:
        report.outcome, report.longrepr = "failed", used[0]
    return report


# ---------------------------------------------------------------------------------------------------- data sets

TEXT = (
    "the a of and to in is that it was for on are as with his they at be this from have or by one had not but what "
    "life love truth world people time good way heart mind dream friend book day light never always every"
)
WORDS = TEXT.split()


def sentences(count: int) -> list[str]:
    draws = random.Random(0)
    lengths = (draws.randint(6, 40) for _ in range(count))
    return [" ".join(draws.choice(WORDS) for _ in range(n)).capitalize() + "." for n in lengths]


def data_set(name: str, *args: Any, split: str | None = None, **kwargs: Any) -> Any:
    """Stand for `datasets.load_dataset`."""
    import datasets
    import numpy as np

    columns: dict[str, dict[str, list[Any]]]
    if name.endswith(("english_quotes", "english_quotes_copy")):
        columns = {"train": {"quote": sentences(200), "author": ["A"] * 200, "tags": [["t"]] * 200}}
    elif name == "nyu-mll/glue":
        sizes = {"train": 64, "validation": 32, "test": 32}
        columns = {
            part: {"sentence": sentences(n), "label": [i % 2 for i in range(n)], "idx": list(range(n))}
            for part, n in sizes.items()
        }
    elif name == "scikit-learn/iris":
        from sklearn.datasets import load_iris

        iris = load_iris()
        heads = ("SepalLengthCm", "SepalWidthCm", "PetalLengthCm", "PetalWidthCm")
        kinds = [str(iris.target_names[t]) for t in iris.target]
        columns = {"train": dict(zip(heads, iris.data.T.tolist(), strict=True), Species=kinds)}
    elif name == "huggingface/cats-image":
        from PIL import Image

        noise = np.random.RandomState(0).randint(0, 255, (48, 64, 3), dtype=np.uint8)
        return {"test": {"image": [Image.fromarray(noise).resize((640, 480))]}}
    else:
        raise RuntimeError(f"data set {name!r} has no stand-in")
    made = {part: datasets.Dataset.from_dict(found) for part, found in columns.items()}
    return made[split] if split else datasets.DatasetDict(made)


# ---------------------------------------------------------------------------------------------------- the run


def note(**facts: Any) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:  # reports come from all workers to the one that started them
        with OUT.open("a") as file:
            file.write(json.dumps(facts) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    import datasets
    import torch

    torch.set_num_threads(1)
    datasets.load_dataset = data_set
    for mark in ("single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes"):
        config.addinivalue_line("markers", f"{mark}: PEFT's")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if ONLY:
        only = set(Path(ONLY).read_text().splitlines())
        items[:] = [i for i in items if i.nodeid in only]
    items[:] = [i for i in items if zlib.crc32(i.nodeid.encode()) % PART == 0]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def why(report: pytest.TestReport | pytest.CollectReport) -> str:
    told = report.longrepr
    if isinstance(told, tuple):
        return str(told[2])
    crash = getattr(told, "reprcrash", None)
    return (crash.message if crash else str(told or ""))[:600]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or not report.passed:
        expected = "x" if hasattr(report, "wasxfail") else ""
        note(test=report.nodeid, outcome=expected + report.outcome, seconds=report.duration, why=why(report))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        note(test=report.nodeid, outcome="failed", seconds=0, why=why(report))
