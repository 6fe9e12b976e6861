# SPDX-License-Identifier: Apache-2.0
"""Which tests `make quick` runs: a draw by a fixed seed from each test function, and more from the laws.

Functions whose tests take long are left out; tests/quick_without.txt has their names. tests/quick_with.txt has tests
of lines that few of the others run, which tests/drawn/choosing.py has chosen by a record of what each test runs.
"""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from pathlib import Path

import pytest

SEED = "1"
LONG = set(Path(__file__).with_name("quick_without.txt").read_text().split())
WITH = Path(__file__).with_name("quick_with.txt")
# one test in so many of a function runs: all where they take a few milliseconds each and notice much
SHARES = {
    "tests/conformance/test_together.py": 9, "tests/conformance/test_matrix.py::test_a_default_device": 1,
    "tests/conformance/": 4, "tests/methods/test_refused.py": 1, "tests/core/test_pieces.py": 9,
    "tests/kernels/test_eager.py": 5, "tests/kernels/test_other_kernels.py": 5, "tests/kernels/test_low_rank.py": 5,
    "tests/kernels/": 1,
    "tests/methods/test_adapterhub.py": 8, "tests/methods/test_places.py": 8, "tests/methods/test_reft.py": 3,
    "tests/methods/test_poly.py": 3, "tests/methods/test_xlora.py": 3, "tests/methods/test_shadow.py": 3,
    "tests/methods/test_lora_extras.py": 3, "tests/methods/test_adaption_prompt.py": 3, "tests/methods/": 2,
    "tests/inject/test_reading.py": 5, "tests/inject/test_stage.py": 5, "tests/inject/": 2,
    "tests/io/test_layouts.py": 5, "tests/io/": 1,
    "tests/core/test_planned.py": 4, "tests/core/test_layer.py::test_under_autocast": 3, "tests/core/": 1,
    "tests/storage/": 5, "tests/": 25,
}  # fmt: skip


def draw_tests(items: list[pytest.Item]) -> list[pytest.Item]:
    """Return the tests of a collection that `make quick` runs, in their order."""
    chosen = draw_names([item.nodeid for item in items]) | set(WITH.read_text().splitlines())
    return [item for item in items if item.nodeid in chosen]


def draw_names(names: list[str]) -> set[str]:
    """Return a share of the tests of each function that is not left out, at least one of each."""
    functions: dict[str, list[str]] = defaultdict(list)
    for name in names:
        function = name.partition("[")[0]
        if function not in LONG:
            functions[function].append(name)
    return {name for function, cells in functions.items() for name in draw_cells(function, cells)}


def draw_cells(function: str, cells: list[str]) -> list[str]:
    """Return a share of the tests of one function, at least one."""
    share = next(share for folder, share in SHARES.items() if function.startswith(folder))
    order = sorted(cells, key=lambda name: zlib.crc32(f"{SEED} {name}".encode()))
    return order[: math.ceil(len(cells) / share)]
