# SPDX-License-Identifier: Apache-2.0
"""The benchmark's own arithmetic: goals, noise, and goals that were met and are lost."""

import itertools
import re
import time
from pathlib import Path

import pytest

import benchmarks
from benchmarks import guard, results, tables
from benchmarks.measure import Effort, Goal, Row, take_turns
from benchmarks.plots import draw
from benchmarks.rows import BENCHES, GROUPS


def row(graft, peft=(10.0,), floor=None, goal=None, what="inject"):
    values = {"graft": list(graft), "PEFT": list(peft)} | ({"floor": list(floor)} if floor else {})
    return Row(what, values, goal or Goal(faster=5.0))


@pytest.fixture
def record(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "RECORD", tmp_path / "met.json")


def test_a_goal_that_is_lost_beyond_the_noise_is_named(record):
    guard.record([row([1.0])])
    assert guard.lost([row([1.0])]) == []
    assert guard.lost([row([2.1])]) == [], "within the noise"
    (text,) = guard.lost([row([3.0])])
    assert "inject" in text and "3.33" in text and "5" in text


def test_what_was_never_met_cannot_be_lost(record):
    assert guard.lost([row([5.0])]) == []
    guard.record([row([5.0])])
    assert guard.lost([row([5.0])]) == []


def test_a_record_keeps_what_was_met(record):
    guard.record([row([1.0]), row([1.0], what="load")])
    guard.record([row([5.0])])
    assert len(guard.lost([row([5.0])])) == len(guard.lost([row([5.0], what="load")])) == 1


def test_each_round_begins_with_another():
    seen = []

    def turns(who):
        while True:
            seen.append(who)
            yield lambda: time.sleep(0.001)

    ticks = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.measure.time.process_time", lambda: next(ticks) * 1.0)  # each call takes a second
        take_turns({who: turns(who) for who in "abc"}, Effort(quick=True))
    assert "".join(seen[3:]) == "abcbcacab"


def test_unsteady_values_are_noise(record):
    guard.record([row([1.0])])
    steady, shaky = [2.6, 2.6, 2.6, 2.6], [1.5, 2.0, 3.2, 4.5]
    assert len(guard.lost([row(steady)])) == 1 and guard.lost([row(shaky)]) == []


def test_the_floor_counts_too(record):
    goal = Goal(over_floor=1.1)
    guard.record([row([1.0], floor=[1.0], goal=goal)])
    assert guard.lost([row([1.15], floor=[1.0], goal=goal)]) == []
    assert len(guard.lost([row([1.3], floor=[1.0], goal=goal)])) == 1


def test_the_plot_is_written(tmp_path):
    path = tmp_path / "bench.png"
    draw([row([1.0], floor=[0.5]), row([20.0], what="slower")], str(path), "title")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_every_file_of_rows_is_in_the_benchmark_and_names_are_its_own():
    folder = Path(benchmarks.__file__).parent
    files = {p.stem for p in folder.glob("*.py") if re.search(r"^BENCHES\b", p.read_text(), re.MULTILINE)} - {"rows"}
    assert {group.__name__.rpartition(".")[2] for group in GROUPS} == files
    names = [bench.what for bench in BENCHES]
    assert len(set(names)) == len(names)
    assert any("on NF4" in name for name in names)


def test_a_run_is_read_as_it_was_written(tmp_path):
    rows = [row([1.0, 2.0, 4.0], floor=[0.5], what="α"), row([30.0], what="slow"), row([1.0], peft=())]
    path = tmp_path / "run.json"
    results.write(str(path), rows, "graft 9", whole=True, seconds=125.0)
    run = results.read(path)
    assert (run.versions, run.whole) == ("graft 9", True) and "2 minutes" in run.run
    assert [(r.what, r.median("graft"), r.faster, r.over_floor, r.met) for r in run.rows] == [
        ("α", 2.0, 5.0, 4.0, True),
        ("slow", 30.0, 10.0 / 30.0, None, False),
        ("inject", 1.0, None, None, None),
    ]


def test_the_table_of_a_run_for_a_page(tmp_path):
    path = tmp_path / "run.json"
    results.write(str(path), [row([2.0], floor=[1.0]), row([20.0], what="slow")], "", whole=True, seconds=1)
    lines = tables.markdown(results.read(path), once={"slow": "≥ 5 ×"}).splitlines()
    assert lines[0].startswith("| what | graft | PEFT | floor |") and len(lines) == 4
    assert lines[2:] == [
        "| inject | 2 s | 10 s | 1 s | 5.00 | 2.00 | ≥ 5 × | yes |",
        "| slow | 20 s | 10 s |  | 0.50 |  | ≥ 5 × | **no**, once yes |",
    ]


def test_the_run_that_is_shown_is_of_rows_that_there_are():
    assert {r.what for r in results.read().rows} <= {bench.what for bench in BENCHES}
