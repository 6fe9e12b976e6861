# SPDX-License-Identifier: Apache-2.0
"""`graft.train.Resumable` in transformers' Trainer: a training that is resumed has the bits of one that was not."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import graft
from graft.core.errors import AdapterKeyError, CheckpointError, ConfigError
from graft.train import Resumable, find_last_checkpoint
from tests.leaves_out import LATER_EPOCHS
from tests.train.test_resuming import edited, forge
from tests.train.test_trainer import Net


def trainer(folder, callback=None, seed=0, r=2, **options):
    torch.manual_seed(3)
    base = Net()
    torch.manual_seed(seed)
    model = graft.get_peft_model(base, graft.LoraConfig(target_modules=["fc"], r=r, lora_dropout=0.4))
    rows = [{"x": torch.linspace(-1, i, 4), "labels": torch.tensor(i % 2)} for i in range(20)]
    arguments = TrainingArguments(
        str(folder), report_to="none", use_cpu=True, remove_unused_columns=False, disable_tqdm=True, learning_rate=1e-2,
        per_device_train_batch_size=4, warmup_steps=2,
        **{"max_steps": 12, "save_steps": 3, "save_only_model": True, "logging_steps": 1} | options,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=rows, callbacks=[callback or Resumable()])


def copied(whole, folder, step=3):
    """Copy a checkpoint of the whole training; return its path as Trainer takes it."""
    return str(shutil.copytree(whole[0] / f"checkpoint-{step}", folder / f"checkpoint-{step}"))


def outcome(t):
    logs = [(log["step"], log["loss"], log["learning_rate"]) for log in t.state.log_history if "loss" in log]
    return logs, [p.detach().clone() for p in t.model.parameters()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training of 12 steps, 5 in an epoch, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("whole")
    made = trainer(folder, save_steps=1)
    made.train()
    return folder, outcome(made)


@pytest.mark.parametrize("step", [3, 5, pytest.param(9, marks=LATER_EPOCHS)])
@pytest.mark.parametrize("told", [False, True])
def test_bits_of_an_uninterrupted_training(step, told, whole, tmp_path):
    """Within the first epoch, between two, and in the second."""
    (logs, values), checkpoint = whole[1], copied(whole, tmp_path, step)
    watch = Resumable(checkpoint) if told else Resumable()
    again = trainer(tmp_path / "new" if told else tmp_path, watch, seed=8)
    again.train(resume_from_checkpoint=checkpoint)
    found, theirs = outcome(again)
    assert watch.resumed.step == step and found[step:] == logs[step:]
    assert all(torch.equal(a, b) for a, b in zip(theirs, values, strict=True))


def test_no_checkpoint_holds_a_pickle(whole):
    folder, _ = whole
    names = {path.name for path in (folder / "checkpoint-3").iterdir()}
    assert {"training.safetensors", "training.json"} <= names and not names & {"optimizer.pt", "scheduler.pt"}


def test_trainer_resumes_deepspeed_by_its_own_checkpoints(tmp_path):
    arguments = TrainingArguments(str(tmp_path), save_only_model=True, use_cpu=True, report_to="none")
    arguments.deepspeed_plugin = object()  # as transformers sets it, if the arguments or the launcher name DeepSpeed
    with pytest.raises(ConfigError, match="a loop of your own"):
        Resumable().on_init_end(arguments, None, None)


def test_trainer_would_load_by_index(tmp_path):
    with pytest.raises(ConfigError, match="save_only_model=True"):
        trainer(tmp_path, save_only_model=False)


def test_a_model_without_adapters_is_told_before_it_trains(tmp_path):
    made = trainer(tmp_path)
    made.model = made.model.unload()
    with pytest.raises(ConfigError, match="has no adapter"):
        made.train()
    assert not [*tmp_path.iterdir()]


def test_what_does_not_fit_is_told(whole, tmp_path):
    checkpoint, other = copied(whole, tmp_path), Resumable(whole[0] / "checkpoint-6")
    with pytest.raises(CheckpointError, match="was saved at step 6, and Trainer resumes at step 3"):
        trainer(tmp_path, other).train(resume_from_checkpoint=checkpoint)
    (tmp_path / "checkpoint-3" / "training.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"was killed meanwhile\. No checkpoint near it"):
        trainer(tmp_path).train(resume_from_checkpoint=checkpoint)


def test_a_folder_that_is_gone_is_told(tmp_path):
    made = trainer(tmp_path / "gone", Resumable(tmp_path / "away"))
    made.state.global_step = 3
    shutil.rmtree(tmp_path / "gone", ignore_errors=True)
    with pytest.raises(CheckpointError, match=r"checkpoint-3 holds no training\.safetensors.*No checkpoint near it"):
        made.callback_handler.on_train_begin(made.args, made.state, made.control)


def test_another_rank_is_told(whole, tmp_path, monkeypatch):
    again = trainer(tmp_path, r=4)
    monkeypatch.setattr(again, "_load_from_checkpoint", lambda *_: None)  # which says so too, in its own words
    with pytest.raises(AdapterKeyError, match="another rank"):
        again.train(resume_from_checkpoint=copied(whole, tmp_path))


def test_the_newest_checkpoint_that_is_whole(whole, tmp_path):
    """After a kill at any moment: Trainer writes trainer_state.json after its files, Resumable's file comes last."""
    folder, _ = whole
    assert find_last_checkpoint(folder) == str(folder / "checkpoint-12")
    assert find_last_checkpoint(tmp_path) is None
    for step in (2, 10, 11):
        copied(whole, tmp_path, step)
    (tmp_path / "checkpoint-99").mkdir()
    (tmp_path / "checkpoint-1000").write_text("a file")
    newest = tmp_path / "checkpoint-11"
    for file, size in (
        ("training.safetensors", None), ("training.safetensors", 5000), ("trainer_state.json", None),
        ("trainer_state.json", 100), ("model.safetensors", 300), ("training_args.bin", 100),
    ):  # fmt: skip
        assert find_last_checkpoint(tmp_path) == str(newest)
        data = (newest / file).read_bytes()
        (newest / file).unlink() if size is None else (newest / file).write_bytes(data[:size])
        assert get_last_checkpoint(tmp_path).endswith(("11", "99"))
        assert find_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10"), (file, size)
        by_trainer = newest if file == "training.safetensors" and size is None else tmp_path / "checkpoint-10"
        assert find_last_checkpoint(tmp_path, by_name=False) == str(by_trainer)
        (newest / file).write_bytes(data)
    (newest / "training.safetensors").unlink()
    made = trainer(tmp_path)
    with pytest.raises(CheckpointError, match=rf"killed meanwhile. Resume from {tmp_path}/checkpoint-10"):
        made.train(resume_from_checkpoint=str(newest))
    made = trainer(tmp_path, seed=5)
    made.train(resume_from_checkpoint=find_last_checkpoint(tmp_path))
    assert made.state.global_step == 12


@pytest.mark.parametrize("extra", [{}, {"epoch": "x"}, {"epoch": float("nan")}, {"epoch": None}])
def test_a_file_that_does_not_say_its_epoch(extra, whole, tmp_path):
    checkpoint = copied(whole, tmp_path)
    forge(tmp_path / "checkpoint-3", edited("extra", value=extra))
    with pytest.raises(CheckpointError, match="does not hold its epoch"):
        trainer(tmp_path).train(resume_from_checkpoint=checkpoint)
