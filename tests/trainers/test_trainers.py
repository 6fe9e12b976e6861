# SPDX-License-Identifier: Apache-2.0
"""What compares the runs of a trainer notices what differs, and the pages show what was kept."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

from tests.docs import trainers
from tests.trainers import own, results
from tests.trainers.both import differences


def side(folder, weight=0.5, loss=1.25, config=(), logged=()):
    checkpoint = folder / "out" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    save_file({"lora_A.weight": torch.full((2, 2), weight)}, checkpoint / "adapter_model.safetensors")
    state = {"log_history": [{"loss": loss, "step": 1, **dict(logged)}]}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    said = {"r": 8, "target_modules": ["v_proj", "q_proj"], "peft_version": "0.20.0", **dict(config)}
    (checkpoint / "adapter_config.json").write_text(json.dumps(said))
    return folder


def found(tmp_path, **ours):
    return list(differences(side(tmp_path / "peft"), side(tmp_path / "graft", **ours)))


def test_what_may_differ(tmp_path):
    config = {"target_modules": ["q_proj", "v_proj"], "peft_version": "0.21.2", "a_newer_key": 1}
    assert not found(tmp_path, weight=0.5 + 1e-7, loss=1.250001, config=config, logged={"train_runtime": 3.0})


def test_a_tensor_a_loss_and_a_key(tmp_path):
    lines = found(tmp_path, weight=0.50001, loss=1.2501, config={"r": 4})
    assert [line.partition(": ")[0].rpartition("/")[2] for line in lines] == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "trainer_state.json",
    ]


def test_a_file_that_only_one_has(tmp_path):
    ours, theirs = side(tmp_path / "graft"), side(tmp_path / "peft")
    (theirs / "out" / "additional_config.json").touch()
    assert list(differences(theirs, ours)) == ["out/additional_config.json: only with PEFT"]


def test_another_answer(tmp_path):
    ours, theirs = side(tmp_path / "graft"), side(tmp_path / "peft")
    (ours / "said.jsonl").write_text("3")
    (theirs / "said.jsonl").write_text("4")
    assert list(differences(theirs, ours)) == ["said.jsonl: graft '3', PEFT '4'"]


def test_losses_that_are_a_line_each(tmp_path):
    ours, theirs = side(tmp_path / "graft"), side(tmp_path / "peft")
    for folder, loss, seconds in ((ours, 1.25, 3.0), (theirs, 1.5, 4.0)):
        said = [{"train_loss": loss, "step_speed_seconds": seconds}, {"system/cpu_percent": seconds}]
        lines = "".join(json.dumps({"step": 1, "metrics": metrics}) + "\n" for metrics in said)
        (folder / "out/training_metrics.jsonl").write_text(lines)
    (line,) = differences(theirs, ours)
    assert line.startswith("out/training_metrics.jsonl: ") and "train_loss" in line


def test_commands_that_wrote_nothing(tmp_path):
    assert list(differences(tmp_path, tmp_path)) == ["PEFT's commands wrote no tensors"]


def test_how_tests_of_a_trainer_ended(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 0\ndef test_left_out(): pytest.skip()\n"
    )
    (tmp_path / "test_broken.py").write_text("import no_such_module\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    side = SimpleNamespace(library="peft", bin=Path(sys.executable).parent, env=dict(os.environ))
    found = own.outcomes(side, tmp_path, ["."], tmp_path)
    assert {name.rpartition("::")[2]: outcome for name, outcome in found.items()} == {
        **dict(test_good="passed", test_bad="failure", test_left_out="skipped", test_broken="error"),
    }


def test_cases_run_alone_are_kept_beside_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "KEPT", tmp_path / "results.json")
    cases = SimpleNamespace(TITLE="It", PACKAGE="it", CASES=dict.fromkeys("abc"))
    trainer = SimpleNamespace(
        name="it", cases=cases, versions=lambda: dict(it="1", peft="2", transformers="3", torch="4")
    )
    tests = {"both": ["one", "two"], "PEFT alone": ["three"], "neither": []}
    results.record(trainer, {"a": True, "b": False}, tests)
    results.record(trainer, {"c": True, "b": True})
    (run,) = results.kept()
    assert run["equal"] == {"a": True, "b": True, "c": True} and "| 3 of 3; own tests: 2 of 3 |" in results.figures()
    assert results.tests().endswith("| It | 2 | `three`: `three` | – |")
    trainer.versions = lambda: dict(it="2", peft="2", transformers="3", torch="4")
    results.record(trainer, {"c": False})
    assert results.kept()[0]["equal"] == {"c": False} and "| 0 of 1 |" in results.figures()


def test_the_pages_show_the_runs_that_were_kept():
    for page, text in trainers.pages().items():
        assert text == page.read_text(), "run python -m tests.docs.trainers"
