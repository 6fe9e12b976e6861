# SPDX-License-Identifier: Apache-2.0
"""`graft.train.Watch` in transformers' Trainer: one line after the first steps, one at the end."""

import pickle

import pytest
import torch
from transformers import Trainer, TrainingArguments

import graft
from graft.train import Watch
from tests.train.test_trainer import Net


def lines(folder, capsys, steps=6, first=3, optimizers=(None, None), model=None, **options):
    model = model or graft.get_peft_model(Net(), graft.LoraConfig(target_modules=["fc"], r=2))
    rows = [{"x": torch.linspace(-1, 1, 4), "labels": torch.tensor(1)}] * 64
    arguments = TrainingArguments(
        str(folder), max_steps=steps, report_to="none", use_cpu=True, remove_unused_columns=False, save_strategy="no",
        disable_tqdm=True, **options,
    )  # fmt: skip
    watch = Watch(first=first)
    Trainer(model, arguments, train_dataset=rows, callbacks=[watch], optimizers=optimizers).train()
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("graft")], watch


def test_a_training_as_it_should_be(tmp_path, capsys):
    (first, last), watch = lines(tmp_path, capsys, learning_rate=1e-3)
    assert "after 3 steps: nothing is wrong" in first and "at the end, after 6 steps: nothing is wrong" in last
    assert watch.report.ok and watch.report.range_of_updates() in last


@pytest.mark.parametrize("rate, says", [(1e-8, "less than"), (1e4, "times as large")])
def test_a_learning_rate_that_is_none(rate, says, tmp_path, capsys):
    (first, last), watch = lines(tmp_path, capsys, learning_rate=rate)
    assert says in last and "watch.report" in last and not watch.report.ok
    assert (says in first) == (rate > 1)  # small updates may still become large


def test_a_schedule_that_begins_at_0_is_no_finding(tmp_path, capsys):
    (first, _), _ = lines(tmp_path, capsys, first=1, learning_rate=1e-3, warmup_steps=3)
    assert "nothing is wrong" in first


def test_an_optimizer_without_the_adapter(tmp_path, capsys):
    model = graft.get_peft_model(Net(), graft.LoraConfig(target_modules=["fc"], r=2))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    (first, last), watch = lines(tmp_path, capsys, model=model, optimizers=(optimizer, None))
    assert "not in the optimizer (2)" in first and "not in the optimizer (2)" in last and "less than" in last
    assert watch.report.not_moved == ["fc ('default')"]


def test_a_training_shorter_than_its_first_look(tmp_path, capsys):
    assert len(lines(tmp_path, capsys, steps=1, learning_rate=1e-3)[0]) == 1


def test_it_is_a_class_that_pickle_finds():
    assert isinstance(pickle.loads(pickle.dumps(Watch(first=7))), Watch)
