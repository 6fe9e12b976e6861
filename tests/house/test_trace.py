# SPDX-License-Identifier: Apache-2.0
"""A reader of an operation follows no more functions than today. Who raises a limit says why."""

from tests import fresh
from tests.house.trace import trace

# Of graft that each enters. 6 more of an injection and a load: bases that FSDP2 has sharded. 8 more of a save: tensors
# go through one memory, and the base's fingerprint is the registry's. 2 more of an injection and a load: methods
# declare facts and dropouts, and two functions of their base build them.
FUNCTIONS = {"injection": 202, "load": 292, "save": 96, "merge": 74}
CALLS = {"layer, training": 18, "layer, eval": 20}  # into graft's own files, of one LoRA layer


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
