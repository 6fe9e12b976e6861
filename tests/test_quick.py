# SPDX-License-Identifier: Apache-2.0
"""The draw of `make quick`."""

from pathlib import Path
from types import SimpleNamespace

from tests.quick import LONG, WITH, draw_tests

ROOT = Path(__file__).parents[1]


def test_functions_that_are_named_exist():
    for name in LONG | {line.partition("[")[0] for line in WITH.read_text().splitlines()}:
        file, *names = name.split("::")
        assert f"def {names[-1]}(" in (ROOT / file).read_text() or names[-1] == "runTest", name


def test_every_other_function_has_a_test_and_long_ones_none():
    names = [f"tests/conformance/test_x.py::test_a[{i}]" for i in range(30)] + ["tests/io/test_y.py::test_b", min(LONG)]
    chosen = [item.nodeid for item in draw_tests([SimpleNamespace(nodeid=name) for name in names])]
    assert len(chosen) == 9 and chosen[-1] == "tests/io/test_y.py::test_b"
    assert chosen == sorted(chosen, key=names.index)
