# SPDX-License-Identifier: Apache-2.0
"""The benchmark's own arithmetic: goals, noise, and goals that were met and are lost."""

import itertools
import json
import re
import time
from pathlib import Path

import peft
import pytest
import torch
from peft.utils import merge_utils
from safetensors.torch import load_file

import benchmarks
from benchmarks import files, guard, injection, results, switching, tables, weighted
from benchmarks.measure import Effort, Goal, Row, take_turns
from benchmarks.models import SCALING
from benchmarks.plots import draw
from benchmarks.rows import BENCHES, GROUPS


def row(graft, peft=(10.0,), floor=None, goal=None, what="inject"):
    values = {"graft": list(graft), "PEFT": list(peft)} | ({"floor": list(floor)} if floor else {})
    return Row(what, values, goal or Goal(faster=5.0))


@pytest.fixture
def record(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "HISTORY", tmp_path / "history.json")
    days = (f"2026-01-{day:02}" for day in itertools.count(1))
    return lambda *rows: guard.record(list(rows), next(days))


def test_a_row_slower_than_in_the_last_runs_is_named_beyond_the_noise(record):
    record(row([1.0]))
    assert guard.list_losses([row([1.04])]) == [], "within the noise"
    (text,) = guard.list_losses([row([1.1])])
    assert "inject" in text and "9.09" in text and "10.00" in text


def test_a_row_without_a_run_of_this_machine_cannot_be_lost(record, monkeypatch):
    assert guard.list_losses([row([5.0])]) == []
    record(row([1.0]))
    monkeypatch.setattr(guard, "name_machine", lambda: "another")
    assert guard.list_losses([row([5.0])]) == []


def test_a_row_is_held_to_the_median_of_its_last_three_runs(record):
    for graft in (0.1, 1.0, 1.3, 1.1):
        record(row([graft]))
    assert [run.faster for run in guard.read_history()["inject"]] == [10.0, 7.692, 9.091]
    assert guard.list_losses([row([1.15])]) == [] != guard.list_losses([row([1.2])])


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
    record(row([1.0]))
    steady, shaky = [2.6, 2.6, 2.6, 2.6], [0.5, 0.8, 1.6, 2.5]
    assert len(guard.list_losses([row(steady)])) == 1 and guard.list_losses([row(shaky)]) == []


def test_the_floor_counts_too(record):
    record(row([1.0], floor=[1.0]), row([1.0], peft=[], floor=[1.0], what="alone"))
    assert guard.list_losses([row([1.03], floor=[1.0]), row([1.03], peft=[], floor=[1.0], what="alone")]) == []
    slower = [row([1.3], floor=[1.0]), row([1.3], peft=[], floor=[1.0], what="alone")]
    assert [text.split(":")[0] for text in guard.list_losses(slower)] == ["inject", "alone"]
    assert guard.list_losses([row([1.3], floor=[1.3])]) == [], "the machine is slower, not graft"


def test_an_estimate_is_lost_if_it_met_its_goal_once(record):
    def estimate(value):
        return row([value], peft=[], floor=[1.0], goal=Goal(within=0.1))

    record(estimate(1.5))
    assert guard.list_losses([estimate(2.0)]) == []
    record(estimate(1.05))
    assert guard.list_losses([estimate(0.95)]) == [] != guard.list_losses([estimate(1.5)])


def test_rows_that_never_moved_are_sampled_those_that_ran_longest_ago_first(record):
    still = [f"still {i}" for i in range(10)]
    goals = {what: Goal(faster=5.0) for what in [*still, "moves", "misses", "new"]}
    for faster in (1.0, 1.05, 1.2):
        rows = [row([1.0 + 0.01 * faster], what=what) for what in still]
        record(*rows, row([faster], what="moves"), row([5.0], what="misses"))
    first = guard.sample_rows(goals)
    assert first == {"moves", "misses", "new", *still[:2]}
    record(*(row([1.0], what=what) for what in first & set(still)))
    assert guard.sample_rows(goals) == {"moves", "misses", "new", *still[2:4]}


@pytest.mark.parametrize(("values", "expected"), [((2, 10, 1), True), ((2.1, 10.5, 1), False), ((2, 9, 1), False)])
def test_a_goal_is_judged_by_all_that_it_is_about(values, expected):
    both = Goal(faster=5.0, over_floor=2.0)
    assert both.met(row(*([value] for value in values))) is expected
    assert both.met(row([2.0], [10.0])) is None is both.met(row([2.0], [], [1.0])), "a value is lacking"
    assert Goal().met(row([1.0])) is None


def test_the_plot_is_written(tmp_path):
    path = tmp_path / "bench.png"
    draw([row([1.0], floor=[0.5]), row([20.0], what="slower")], str(path), "title")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_every_file_of_rows_is_in_the_benchmark_and_names_are_its_own():
    folder = Path(benchmarks.__file__).parent
    found = {p.stem for p in folder.glob("*.py") if re.search(r"^BENCHES\b", p.read_text(), re.MULTILINE)} - {"rows"}
    assert {group.__name__.rpartition(".")[2] for group in GROUPS} == found
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


def test_goals_met_once_are_judged_by_todays(record):
    record(row([1.0], floor=[0.5]), row([3.0], what="load"))
    goals = {"inject": Goal(1.0, 3.0), "load": Goal(5.0), "never run": Goal(1.0)}
    assert guard.list_goals_met_once(goals) == {"inject": "≥ 1 ×, ≤ 3 × floor"}


def test_rows_that_ran_again_stand_in_for_those_of_the_whole_run_by_the_goals_of_today(tmp_path):
    paths = [tmp_path / name for name in ("whole.json", "again.json")]
    results.write(paths[0], [row([1.0], floor=[1.0], what=w) for w in ("same", "again", "old")], "", True, 60.0)
    results.write(paths[1], [row([2.0], floor=[0.5], what=w) for w in ("again", "new")], "", False, 60.0)
    goals = {"same": Goal(1.0, 1.2), "new": Goal(1.0, 5.0), "again": Goal(1.0, 3.0), "never run": Goal(1.0)}
    whole, again = map(results.read, paths)
    rows, text = results.joined(goals, whole, [again])
    assert [(r.what, r.over_floor, r.goal.met(r)) for r in rows] == [
        ("same", 1.0, True),
        ("new", 4.0, True),
        ("again", 4.0, False),
    ]
    assert text.startswith(whole.run) and "2 rows ran again" in text and text.endswith(": new; again")


def test_the_history_is_of_rows_that_there_are():
    for machine in json.loads(guard.HISTORY.read_text()):
        assert guard.read_history(machine).keys() <= {bench.what for bench in BENCHES}


# floors: they do what they stand for


def run_once(turns):
    return next(turns)()


def test_the_floor_of_an_injection_draws_what_peft_does():
    build, config = injection.blocks(1), injection.lora
    torch.manual_seed(3)
    made = run_once(injection.least(build, injection.FIRST)())
    after = torch.rand(1)
    torch.manual_seed(3)
    model = peft.get_peft_model(build(), config(peft))
    assert torch.equal(after, torch.rand(1)), "the generators have drawn as many numbers"
    theirs = [p for name, p in model.named_parameters() if "lora_" in name]
    assert [len(modules) for modules in made] == [injection.FIRST] * 7
    for mine, p in zip([m.weight for modules in made for m in modules[:2]], theirs, strict=True):
        assert torch.equal(mine, p)


def test_the_floor_of_a_load_has_the_tensors_of_the_file():
    found = run_once(files.read())
    read = load_file(f"{files.saved()}/{files.WEIGHTS}")
    assert found.keys() == read.keys() and all(torch.equal(found[key], read[key]) for key in read)


def test_the_floor_of_a_state_dict_is_the_state_dict():
    found = run_once(switching.collect())
    theirs = peft.get_peft_model_state_dict(switching.loaded(peft, 2))
    assert found.keys() == theirs.keys() and all(found[key].shape == theirs[key].shape for key in theirs)


@pytest.fixture
def factors():
    """A and B of three adapters of a layer, and Σ w s B A."""
    As, Bs = ([torch.randn(*shape, dtype=torch.float64) for _ in weighted.NAMES] for shape in ((16, 50), (60, 16)))
    return As, Bs, sum(SCALING * w * B @ A for A, B, w in zip(As, Bs, weighted.WEIGHTS))


def test_the_floor_of_cat_is_the_sum(factors):
    As, Bs, full = factors
    A, B = weighted.cat(As, Bs)
    torch.testing.assert_close(B @ A, full)


def test_the_floor_of_svd_is_the_best_product(factors):
    As, Bs, full = factors
    A, B = weighted.svd(As, Bs)
    U, S, V = torch.linalg.svd(full)
    torch.testing.assert_close(B @ A, U[:, :16] @ S[:16].diag() @ V[:16])


def test_the_floor_of_ties_is_pefts(factors):
    weights = torch.tensor([SCALING * w for w in weighted.WEIGHTS], dtype=torch.float64)
    for ts, found in zip(factors[:2], weighted.ties(*factors[:2])):
        torch.testing.assert_close(found, merge_utils.ties([t.clone() for t in ts], weights, 0.5))


def test_the_floor_of_linear_is_a_sum(factors):
    for ts, found in zip(factors[:2], weighted.sums(*factors[:2])):
        torch.testing.assert_close(found, sum(SCALING * w * t for t, w in zip(ts, weighted.WEIGHTS)))
