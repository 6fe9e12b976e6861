# SPDX-License-Identifier: Apache-2.0
"""What can be drawn from a source, and that a process gets it."""

import importlib.util

import pytest

from tests.drawn.changes import Finder, draw_changes
from tests.drawn.choosing import choose_tests
from tests.drawn.mapping import PACKAGE, Record
from tests.drawn.patching import Functions

SOURCE = '''
LIMIT = 3

def double(x: int = 1, *, up=True) -> int:
    """Double."""
    if x > LIMIT and not up:
        raise ValueError("too large")
    values = [x]
    values.append(x)
    return sum(values, start=0)
'''


@pytest.mark.parametrize(
    "old, new",
    [
        ("LIMIT = 3", "LIMIT = 4"), ("x: int = 1", "x: int = 2"), ("up=True", "up=False"), ("x > LIMIT", "x <= LIMIT"),
        ("and not up", "or not up"), ("not up", "up"), ('raise ValueError("too large")', "pass"),
        ("values.append(x)", "pass"), ("values, start=0", "values"), ("start=0", "start=1"),
    ],
)  # fmt: skip
def test_each_kind_of_change_is_found(old, new):
    texts = [change.apply(SOURCE) for change in Finder("a.py", SOURCE).changes()]
    assert SOURCE.replace(old, new) in texts


def test_texts_and_annotations_stay():
    for change in Finder("a.py", SOURCE).changes():
        assert '"""Double."""' in change.apply(SOURCE) and "-> int:" in change.apply(SOURCE)


def test_a_draw_repeats_and_its_changes_keep_the_lines():
    changes = draw_changes(PACKAGE, ["combine"], seed=1, n=20)
    assert changes == draw_changes(PACKAGE, ["combine"], seed=1, n=20) != draw_changes(PACKAGE, ["combine"], 2, 20)
    for change in changes:
        source = (PACKAGE / change.file).read_text()
        assert change.apply(source) != source and change.apply(source).count("\n") == source.count("\n")


def test_a_process_gets_the_change_of_a_function(tmp_path):
    path = tmp_path / "drawn_sample.py"
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("drawn_sample", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    double = module.double
    functions = Functions()
    assert functions.patch(str(path), SOURCE, SOURCE.replace("values.append(x)", "pass"))
    assert double(2) == 2
    assert not functions.patch(str(path), SOURCE, SOURCE.replace("LIMIT = 3", "LIMIT = 4"))


def test_tests_that_were_not_recorded_follow_those_of_their_function(tmp_path):
    record = Record(tmp_path)
    record.times = {"t.py::a[0]": 0.2, "t.py::b": 0.1, "t.py::c[0]": 0.1, "t.py::d": 0.1}
    record._lines = {"core/x.py": {"t.py::a[0]": {7}, "t.py::b": {7, 9}, "t.py::c[0]": {9}}}
    tests = ["t.py::a[0]", "t.py::a[1]", "t.py::b", "t.py::c[0]", "t.py::c[1]", "t.py::d", "t.py::e"]
    chosen = record.tests_of("core/x.py", 7, range(6, 9), tests)
    assert chosen == ["t.py::b", "t.py::a[0]", "t.py::a[1]", "t.py::c[1]"]
    assert record.tests_of("core/x.py", 8, range(9, 10), ["t.py::c[0]", "t.py::d"]) == ["t.py::c[0]"]


def test_tests_are_chosen_by_what_they_add():
    lines = {
        "drawn": {0, 1},
        "same": {0, 1},
        "more": {0, 2, 3},
        "most": {0, 1, 2, 3, 4},
        "slow": {5, 6, 7},
        "again": {4},
    }
    times = dict.fromkeys(lines, 0.1) | {"slow": 9.0, "most": 0.4}
    assert list(choose_tests(lines, times, ["drawn"], 0.15)) == ["more", "again"]
    assert list(choose_tests(lines, times, ["drawn"], 0.25)) == ["more", "again", "same"]
