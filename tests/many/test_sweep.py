# SPDX-License-Identifier: Apache-2.0
"""Sweeps: which settings go on, what is left of them, and the same table in one process and in two."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch

import graft
from examples import sweep
from graft.core.errors import CheckpointError, ConfigError
from graft.many import MultiTrain, run_file, search
from graft.many.sweep import TABLE
from tests.many.alone import BITS, Spec, alone, as_alone, batches, lora, tiny
from tests.trust.fuzz import difference, snapshot

ROOT = Path(__file__).parents[2]
SPACE = {"r": [2, 4], "lr": [1e-3, 1e-2, 3e-2], "accumulate": [1]}
VALID = batches(2)
OPTIONS = dict(steps=8, keep=1 / 2, rungs=3, seed=3)


def swept(folder=None, space=SPACE, model=None, **options):
    given = {"data": Spec(None, seed=3).data(), "valid": VALID} | OPTIONS | options
    return graft.sweep(model or tiny(), lora(), space, folder=folder, **given)


# numbers


def test_settings():
    grid = search.list_settings({"r": [2, 4], "lr": [1.0]}, "grid", None, 0)
    assert grid == [{"r": 2, "lr": 1.0}, {"r": 4, "lr": 1.0}]
    found = search.list_settings({"r": [2, 4, 8], "lr": (1e-5, 1e-1)}, "random", 200, 0)
    assert len(found) == 200 and {s["r"] for s in found} == {2, 4, 8}
    logs = [math.log10(s["lr"]) for s in found]
    assert min(logs) > -5 and max(logs) < -1 and abs(sum(logs) / 200 + 3) < 0.3
    assert found == search.list_settings({"r": [2, 4, 8], "lr": (1e-5, 1e-1)}, "random", 200, 0)
    assert found != search.list_settings({"r": [2, 4, 8], "lr": (1e-5, 1e-1)}, "random", 200, 1)


def test_a_range_of_ints_has_whole_numbers():
    found = [s["r"] for s in search.list_settings({"r": (2, 5)}, "random", 4, 0)]
    assert sorted(found) == [2, 3, 4, 5] and all(type(r) is int for r in found)
    assert type(search.list_settings({"lr": (1, 5.0)}, "random", 1, 0)[0]["lr"]) is float


@pytest.mark.parametrize("given, text", [
    (({"r": 4}, "grid", None, 0), "'r' must be a list"),
    (({"r": (2, 4)}, "grid", None, 0), "'r' must be a list"),
    (({"r": []}, "grid", None, 0), "'r' must be a list"),
    (({"lr": (-1.0, 1.0)}, "random", 3, 0), "a range of positive numbers"),
    (({"r": [1]}, "random", None, 0), "with a number n"),
    (({"r": [1]}, "other", 3, 0), "must be 'grid'"),
    (({"r": [1, 2]}, "random", 3, 0), "has only 2 settings, and n is 3"),
    (({"r": [1, 2]}, "grid", 3, 0), "n=3 belongs to search='random'"),
])  # fmt: skip
def test_no_settings(given, text):
    with pytest.raises(ConfigError, match=text):
        search.list_settings(*given)


def test_budgets():
    assert search.compute_rungs(96, 1 / 4, 3) == [6, 24, 96] and search.compute_rungs(10, 1.0, 5) == [10]
    for wrong in ((3, 1 / 4, 3), (10, 0.0, 2), (10, 0.5, 0)):
        with pytest.raises(ConfigError, match="sweep: "):
            search.compute_rungs(*wrong)


def test_the_best_come_first():
    losses = {0: math.nan, 1: 2.0, 2: 1.0, 3: 1.0, 4: math.inf}
    assert search.select_best(losses, 9) == [2, 3, 1, 4, 0]


# with a model


def test_halving_takes_the_best_to_the_end(tmp_path):
    found = swept(tmp_path)
    assert [len(t.losses) for t in found.ranking] == [3, 3, 2, 1, 1, 1]
    assert [t.steps for t in found.ranking] == [8, 8, 4, 2, 2, 2]
    for rung in range(2):
        there = sorted((t for t in found.trials if len(t.losses) > rung), key=lambda t: t.losses[rung])
        best = {t.name for t in there[: math.ceil(len(there) / 2)]}
        assert best == {t.name for t in found.trials if len(t.losses) > rung + 1}
    assert found.best.loss == min(t.loss for t in found.trials if t.state == "kept")
    assert {t.state for t in found.trials} == {"kept", "dropped"}
    assert len(found.table().rows) == len(found.trials)
    assert json.loads((tmp_path / TABLE).read_text())["trials"][0]["curve"][0] == found.trials[0].curve[0]
    folders = {path.parent.name for path in tmp_path.glob("*/adapter_config.json")}
    assert folders == {t.name for t in found.trials if t.state == "kept"} == {*run_file.list_runs(tmp_path)}


def test_the_winner_is_the_run_alone(tmp_path):
    found = swept(tmp_path)
    best = found.best
    spec = Spec(lora(r=best.setting["r"]), best.setting["lr"], seed=3)
    parameters, losses = alone(spec, 8)
    assert as_alone(found.runs[best.name].parameters, parameters)
    assert [p[1] for p in best.curve] == pytest.approx(losses, rel=0.0 if BITS else 1e-4)
    assert found.runs.unload() is found.runs.base
    model = graft.PeftModel.from_pretrained(tiny(), str(tmp_path / best.name))
    with torch.no_grad():
        loss = sum(model(**batch).loss.item() for batch in VALID) / 2
    assert loss == pytest.approx(best.loss)


def die_at(numbers, monkeypatch):
    """Have the steps of these numbers, counted over all sweeps, raise KeyboardInterrupt."""
    step, calls = MultiTrain.step, []

    def dying(self):
        calls.append(None)
        if len(calls) in numbers:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(MultiTrain, "step", dying)


def test_a_sweep_that_was_killed_goes_on(tmp_path, monkeypatch):
    whole = swept()
    die_at((2, 5, 9), monkeypatch)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            swept(tmp_path, save_every=1)
    found = swept(tmp_path, save_every=1)
    assert found.rows == whole.rows and [t.curve for t in found.trials] == [t.curve for t in whole.trials]
    again = swept(tmp_path)
    assert again.rows == whole.rows
    with pytest.raises(ConfigError, match="is of another sweep, with other settings"):
        swept(tmp_path, space={"r": [2], "lr": [1e-3]})


@pytest.mark.slow
def test_two_processes_give_the_table_of_one(tmp_path, capsys):
    """By torch's launcher, as the example says."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "examples/sweep.py", "--quick", "--out", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    threads = torch.get_num_threads()
    try:
        sweep.main(["--quick", "--out", str(tmp_path / "one")])
    finally:
        torch.set_num_threads(threads)
    assert done.stdout == capsys.readouterr().out and "kept" in done.stdout
    one, two = ((tmp_path / at / TABLE).read_text() for at in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("rank", [0, 1])
def test_a_share_that_meets_the_others_by_other_means(rank):
    """Any scheduler may be in between. Here the other share is played from a sweep in one process."""
    whole, calls = swept(), []

    def exchange(own):
        calls.append(None)
        theirs = [asdict(t) | {"losses": t.losses[: len(calls)], "state": "running"} for t in whole.trials]
        for i in range(rank, len(theirs), 2):
            theirs[i]["losses"] = []
        return [own, theirs]

    found = swept(share=(rank, 2), exchange=exchange)
    assert len(calls) == 3 and [t.losses for t in found.trials] == [t.losses for t in whole.trials]
    assert {*found.runs.names} == {t.name for t in whole.trials[rank::2] if t.state == "kept"}


def test_what_an_ended_sweep_kept_is_there_again(tmp_path, monkeypatch):
    """Also if the process ended before it had written the adapters."""
    with monkeypatch.context() as m:
        m.setattr(MultiTrain, "save_adapter", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            swept(tmp_path)
    assert not [*tmp_path.glob("*/adapter_config.json")]
    found, whole = swept(tmp_path), swept()
    kept = {t.name for t in whole.trials if t.state == "kept"}
    assert {*found.runs.names} == kept == {path.parent.name for path in tmp_path.glob("*/adapter_config.json")}
    for name in kept:
        assert all(map(torch.equal, found.runs[name].parameters, whole.runs[name].parameters))


@pytest.mark.parametrize("change, text", [
    ({"seed": 4}, "seed"), ({"optimizer": torch.optim.SGD}, "optimizer"),
    ({"optimizer": partial(torch.optim.AdamW, weight_decay=0.5)}, "optimizer"), ({"clip": 0.1}, "options"),
    ({"data": Spec(None, seed=4).data()}, "data"), ({"valid": batches(2, seed=4)}, "valid"),
    ({"loss": lambda output, batch: output["logits"].mean()}, "options"),
])  # fmt: skip
def test_another_sweep_in_the_folder(tmp_path, change, text, monkeypatch):
    """Also if that one was killed before its first rung."""
    with monkeypatch.context() as m:
        m.setattr(MultiTrain, "step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            swept(tmp_path)
    with pytest.raises(ConfigError, match=f"is of another sweep, with other {text}\\."):
        swept(tmp_path, **change)


def test_other_data_of_a_function_in_the_folder(tmp_path):
    """Its name says nothing of the batches: the files of kept runs do."""
    swept(tmp_path, data=lambda setting: batches(8))
    base = tiny()
    before = snapshot(base)
    with pytest.raises(ConfigError, match="was begun with other data"):
        swept(tmp_path, data=lambda setting: batches(8, seed=1), model=base)
    assert difference(before, snapshot(base)) == ""
    swept(tmp_path, data=lambda setting: batches(8))


ODD = {
    "no JSON": "{", "a list": [], "no rows": {"sweep": {}}, "rows": {"sweep": {}, "trials": 3},
    "a row": {"sweep": {}, "trials": [3]}, "another number": lambda t: t["trials"].pop(),
    "a name": lambda t: t["trials"][0].update(name="x"), "a path": lambda t: t["trials"][0].update(name="../x"),
    "losses": lambda t: t["trials"][0].update(losses=["x"]), "steps": lambda t: t["trials"][0].update(steps=-1),
    "state": lambda t: t["trials"][0].update(state=[]), "curve": lambda t: t["trials"][0].update(curve=[[1]]),
    "deep": "[" * 100_000, "a key twice": '{"sweep": {}, "sweep": {}, "trials": []}',
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_a_table_that_is_damaged(name, tmp_path):
    arguments = dict(space={"lr": [1e-3, 1e-2]}, data=batches(4), steps=2, rungs=1, folder=tmp_path)
    swept(**arguments)
    path = tmp_path / TABLE
    document = json.loads(path.read_text())
    odd = ODD[name]
    if callable(odd):
        odd(document)
        odd = document
    elif isinstance(odd, dict):
        odd = odd | {"sweep": document["sweep"]}
    path.write_text(odd if isinstance(odd, str) else json.dumps(odd))
    held = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match=r"sweep\.json"):
        swept(**arguments)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == held


def test_settings_that_are_no_json(tmp_path, monkeypatch):
    """Classes, functions and tuples, of a sweep that goes on in another process."""
    from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR

    space = {"schedule": [ConstantLR, partial(CosineAnnealingLR, T_max=8)], "betas": [(0.9, 0.99), (0.5, 0.9)]}
    whole = swept(space=space, rungs=2)
    die_at((6,), monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        swept(tmp_path, space=space, rungs=2, save_every=1)
    found = swept(tmp_path, space=space, rungs=2)
    assert found.rows == whole.rows and found.best.setting in search.list_settings(space, "grid", None, 0)


def test_a_loss_that_is_infinite_at_the_end_keeps_nothing(monkeypatch):
    evaluate = MultiTrain.evaluate

    def infinite(self, names, data):
        found = evaluate(self, names, data)
        return found | {"s0": math.inf} if "s0" in found and self["s0"].step == 8 else found

    monkeypatch.setattr(MultiTrain, "evaluate", infinite)
    found = swept(space={"r": [2, 4]}, rungs=1)
    assert [t.state for t in found.trials] == ["dropped", "kept"] and found.runs.names == ["s1"]


@pytest.mark.parametrize("options, error, text", [
    ({"lr": 1e-3}, TypeError, r"sweep\(\) takes no 'lr'\. Arguments of the optimizer go into the space"),
    ({"space": {"learning_rate": [1e-3]}}, ConfigError, r"\['learning_rate' \(here 'lr'\)\] in the space"),
    ({"optimizer": torch.optim.AdamW([torch.zeros(1)])}, ConfigError, "must be a class of optimizers, or a partial"),
    ({"steps": None}, ConfigError, "steps must be a positive int, got None"),
    ({"steps": 0}, ConfigError, "steps must be a positive int, got 0"),
    ({"keep": "half"}, ConfigError, r"keep must be in \(0, 1\] .* got 'half'"),
    ({"share": 3}, ConfigError, r"share must be \(number of this process, of all\), counted from 0, got 3"),
    ({"share": (0, 2)}, ConfigError, r"share=\(0, 2\) divides the settings among 2 processes.*pass exchange="),
    ({"share": (2, 2), "exchange": lambda rows: [rows]}, ConfigError, r"share must be .* got \(2, 2\)"),
    ({"at_once": 0}, ConfigError, "at_once must be a positive int, got 0"),
    ({"save_every": 0}, ConfigError, "save_every must be a positive int, got 0"),
    ({"valid": None}, ConfigError, "iterated again and again"),
    ({"valid": iter(VALID)}, ConfigError, "iterated again and again"),
    ({"valid": type("Indexed", (), {"__getitem__": lambda *_: VALID[0]})()}, ConfigError, "iterated again and again"),
    ({"space": {"nothing": [1], "r": [2]}}, ConfigError, r"\['nothing'\] in the space are neither fields of Lora"),
    ({"space": {"steps": [1], "r": [2]}}, ConfigError, r"\['steps'\] in the space are neither fields of LoraConfig"),
    ({"space": {"params": [1], "r": [2]}}, ConfigError, r"\['params'\] in the space are neither fields of LoraConfig"),
])  # fmt: skip
def test_what_cannot_be_is_said_before_anything_is_added(options, error, text, monkeypatch):
    monkeypatch.setattr(MultiTrain, "add", None)
    with pytest.raises(error, match=text):
        swept(**options)


def test_an_error_gives_the_base_back():
    base = tiny()
    before = {name: p.clone() for name, p in base.state_dict().items()}
    with pytest.raises(ConfigError, match="positive"):
        swept(space={"r": [2, 0]}, model=base)
    assert {*before} == {*base.state_dict()} and not hasattr(base, "peft_config")
    assert all(torch.equal(t, before[name]) for name, t in base.state_dict().items())


def test_settings_that_fail():
    with pytest.warns(graft.PeftWarning, match="not finite"):
        found = swept(space={"lr": [1e-3, math.nan, 1e-2]}, optimizer=torch.optim.SGD, rungs=2)
    assert (found.trials[1].state, found.trials[1].steps, found.best.state) == ("failed", 1, "kept")
    with pytest.warns(graft.PeftWarning), pytest.raises(ConfigError, match="every setting has failed"):
        swept(space={"lr": [math.nan, math.inf]}, optimizer=torch.optim.SGD, steps=20, rungs=1)


def test_runs_look_between_their_rungs(tmp_path):
    """With `every`; the losses of rungs are those without."""
    found, plain = swept(tmp_path, every=1), swept()
    looks = {run.name: [look.step for look in run.valid] for run in found.runs.list_runs()}
    assert looks and all(steps == [1, 2, 3, 4, 5, 6, 7, 8] for steps in looks.values())
    assert [asdict(trial) for trial in found.trials] == [asdict(trial) for trial in plain.trials]
    still = swept(every=1, stop=lambda run: len(run.valid) == 3, space={"lr": [0.0]}, rungs=1)
    assert (still.best.state, still.best.steps) == ("kept", 3)


def test_names_of_a_space():
    swept(space={"weight_decay": [0.1]}, optimizer=partial(torch.optim.AdamW, lr=1e-3), rungs=1)
    swept(space={"any": [0.1]}, optimizer=lambda parameters, **_: torch.optim.AdamW(parameters), rungs=1)
    data = []
    swept(space={"lora_alpha": [4, 8], "clip": [0.5]}, data=lambda setting: data.append(setting) or batches(8), rungs=1)
    assert data == [{"lora_alpha": 4, "clip": 0.5}, {"lora_alpha": 8, "clip": 0.5}]
