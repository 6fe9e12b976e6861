# SPDX-License-Identifier: Apache-2.0
"""A Trainer as the description of a run: what it would have trained, beside others."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import Trainer, TrainingArguments, set_seed

import graft
from graft.core.errors import ConfigError
from graft.many import MultiTrain
from tests.many.alone import SPECS, alone, as_alone, batches, lora, rows, tiny


def trainer_of(tmp_path, model, kind=Trainer, options=None, **more):
    arguments = dict(
        per_device_train_batch_size=4, learning_rate=1e-2, seed=5, report_to="none", save_strategy="no",
        logging_strategy="no", disable_tqdm=True, use_cpu=True,
        remove_unused_columns=False,
    )  # fmt: skip
    return kind(model, TrainingArguments(tmp_path, **arguments | (options or {})), train_dataset=rows(1), **more)


CASES = {
    "epochs": dict(num_train_epochs=2),
    "accumulates": dict(max_steps=7, gradient_accumulation_steps=4, lr_scheduler_type="cosine", warmup_steps=2),
    "decays": dict(max_steps=5, weight_decay=0.1, max_grad_norm=0.0, optim="sgd"),
    "own loss": dict(max_steps=5, gradient_accumulation_steps=2),
}


def squares(outputs, labels, num_items_in_batch):
    return outputs.logits.square().sum() / num_items_in_batch


@pytest.mark.filterwarnings("ignore:.*graft.compat.peft")
@pytest.mark.parametrize("case", CASES)
def test_it_trains_what_the_trainer_would(tmp_path, case):
    options, more = CASES[case], {"compute_loss_func": squares} if case == "own loss" else {}
    set_seed(5)
    model = graft.get_peft_model(tiny(), lora(r=4))
    trainer_of(tmp_path, model, options=options, **more).train()
    base = tiny()
    runs = MultiTrain(base)
    run = runs.add("described", lora(r=4), trainer=trainer_of(tmp_path, base, options=options, **more))
    other = runs.add("other", SPECS["plain"].config, **SPECS["plain"].options(9))
    runs.run()
    assert as_alone(run.parameters, [p for p in model.parameters() if p.requires_grad])
    assert as_alone(other.parameters, alone(SPECS["plain"], 9)[0])


class Twice(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        return model(**inputs).loss + model(**inputs).loss


class Others(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        return model(**{k: torch.cat([v, v]) for k, v in inputs.items()}).loss


class Never(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        return torch.zeros(())


@pytest.mark.parametrize("kind, text", [
    (Twice, "Twice.compute_loss calls the model twice"),
    (Others, r"Others.compute_loss calls the model with other inputs \(input_ids, labels\)"),
    (Never, "Never.compute_loss did not call the model"),
])  # fmt: skip
def test_what_a_joint_pass_cannot_give_is_refused(tmp_path, kind, text):
    base = tiny()
    runs = MultiTrain(base)
    runs.add("x", lora(), trainer=trainer_of(tmp_path, base, kind))
    with pytest.raises(ConfigError, match=f"Run 'x': {text}"):
        runs.step()


@pytest.mark.parametrize("option", [{"bf16": True}, {"neftune_noise_alpha": 5.0}])
def test_arguments_that_its_loop_would_act_on(tmp_path, option, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # which these arguments change
    base, (name,) = tiny(), option
    trainer = trainer_of(tmp_path, base, options=option)
    with pytest.warns(graft.PeftWarning, match=f"Run 'x': its Trainer's {name} counts for nothing"):
        MultiTrain(base).add("x", lora(), trainer=trainer)


def test_a_base_that_is_in_bfloat16_already_is_no_news(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    base = tiny().to(torch.bfloat16)
    trainer = trainer_of(tmp_path, base, options={"bf16": True})
    with warnings.catch_warnings():
        warnings.simplefilter("error", graft.PeftWarning)
        MultiTrain(base).add("x", lora(), trainer=trainer)


def test_a_trainer_whose_run_was_refused_is_as_it_was(tmp_path):
    """It is added under another name, as the error says."""
    runs, base = MultiTrain(tiny()), tiny()
    runs.add("x", lora(), trainer=trainer_of(tmp_path, runs.base, options={"max_steps": 2}))
    runs.save(tmp_path / "runs")
    trainer = trainer_of(tmp_path, base, options={"max_steps": 2, "weight_decay": 0.1})
    runs = MultiTrain.resume(base, tmp_path / "runs")
    with pytest.raises(ConfigError, match=r"was begun with .*under another name"):
        runs.add("x", lora(), trainer=trainer)
    runs.add("y", lora(), trainer=trainer)
    assert runs.run()["y"].step == 2


def test_what_a_trainer_says_is_not_said_twice(tmp_path):
    base = tiny()
    runs, trainer = MultiTrain(base), trainer_of(tmp_path, base)
    with pytest.raises(ConfigError, match="its trainer sets data, clip"):
        runs.add("x", lora(), trainer=trainer, data=batches(1), clip=1.0)
    trainer.create_optimizer_and_scheduler(3)
    with pytest.raises(ConfigError, match="has an optimizer already"):
        runs.add("x", lora(), trainer=trainer)
    assert runs.model is None
