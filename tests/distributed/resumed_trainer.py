# SPDX-License-Identifier: Apache-2.0
"""Check that processes run, each with a copy of a model: Trainer with `graft.train.Resumable`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import graft
import graft.compat.peft

graft.compat.peft.install()  # so that Trainer saves and loads adapters alone

from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from graft.train import Resumable

STEPS, STEP = 6, 3


def trainer(folder: Path, seed: int, callback: Any) -> Trainer:
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=31)
    arguments = TrainingArguments(
        str(folder), report_to="none", disable_tqdm=True, learning_rate=1e-2, per_device_train_batch_size=2,
        max_steps=STEPS, save_steps=STEP, save_only_model=True, logging_steps=1, use_cpu=True,
    )  # fmt: skip
    torch.manual_seed(3)
    base = LlamaForCausalLM(LlamaConfig(**sizes))
    torch.manual_seed(seed)
    config = graft.LoraConfig(r=2, lora_dropout=0.4, target_modules=["q_proj", "up_proj"])
    model = graft.get_peft_model(base, config)
    rows = [{"input_ids": (torch.arange(6) * (i + 1)) % 31, "labels": (torch.arange(6) + i) % 31} for i in range(20)]
    return Trainer(model, arguments, train_dataset=rows, callbacks=[callback])


def outcome(t: Trainer, step: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    logged = [log["loss"] for log in t.state.log_history if "loss" in log and log["step"] > step]
    return logged, {n: v.clone() for n, v in graft.get_peft_model_state_dict(t.model).items()}


def goes_on(folder: Path) -> None:
    whole = trainer(folder / "whole", 0, Resumable())
    whole.train()
    losses, values = outcome(whole, STEP)
    watch = Resumable(folder / "whole" / f"checkpoint-{STEP}")
    again = trainer(folder / "again", 8, watch)
    again.train(resume_from_checkpoint=str(folder / "whole" / f"checkpoint-{STEP}"))
    assert watch.resumed.step == STEP and watch.resumed.fresh == watch.resumed.missing == []
    found = outcome(again, STEP)
    assert found[0] == losses and len(losses) == STEPS - STEP, (found[0], losses)
    assert all(torch.equal(v, found[1][n]) for n, v in values.items()) and len(values) == 8


def checks(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    yield "ddp", lambda: goes_on(folder)
