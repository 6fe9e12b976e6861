# SPDX-License-Identifier: Apache-2.0
"""A reader of an operation follows no more functions than today. These limits only shrink."""

from tests import fresh
from tests.house.trace import trace

FUNCTIONS = {"injection": 194, "load": 284, "save": 88, "merge": 74}  # of graft that each enters
CALLS = {"layer, training": 19, "layer, eval": 19}  # into graft's own files, of one LoRA layer


def test_operations_enter_no_more_functions():
    """A process of its own: what other tests have loaded adds functions."""
    done = fresh.run("-m", "tests.house.trace")
    assert done.returncode == 0, done.stderr
    rows = [line.rsplit(None, 3) for line in done.stdout.splitlines()[1:]]
    traces = {name.strip(): (int(calls), int(functions)) for name, calls, functions, _ in rows}
    assert {name: traces[name][1] for name in FUNCTIONS if traces[name][1] > FUNCTIONS[name]} == {}
    assert {name: traces[name][0] for name in CALLS if traces[name][0] > CALLS[name]} == {}


def test_functions_of_others_are_not_counted():
    assert trace(lambda: sorted([2, 1])) == (0, 0, 0)
