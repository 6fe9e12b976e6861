# SPDX-License-Identifier: Apache-2.0
"""What compares the runs of a trainer notices what differs, and the pages show what was kept."""

import json

import torch
from safetensors.torch import save_file

from tests.docs import trainers
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


def test_commands_that_wrote_nothing(tmp_path):
    assert list(differences(tmp_path, tmp_path)) == ["PEFT's commands wrote no tensors"]


def test_the_pages_show_the_runs_that_were_kept():
    for page, text in trainers.pages().items():
        assert text == page.read_text(), "run python -m tests.docs.trainers"
