# SPDX-License-Identifier: Apache-2.0
"""Checks that processes run, with copies of a model or parts of it: Trainer with `graft.train.Resumable`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import graft
import graft.compat.peft

graft.compat.peft.install()  # so that Trainer saves and loads adapters alone

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from graft.core.errors import ConfigError
from graft.storage.parallel import layout_of
from graft.train import Resumable
from tests.distributed.layouts import in_units

STEPS, STEP = 6, 3
FSDP2: dict[str, Any] = dict(fsdp=True, fsdp_config=dict(transformer_layer_cls_to_wrap=["LlamaDecoderLayer"]))
NO_WRAP: dict[str, Any] = dict(fsdp=True, fsdp_config=dict(auto_wrap_policy="NO_WRAP"))


def trainer(folder: Path, seed: int, callback: Any, before: bool = False, **options: Any) -> Trainer:
    """Return a Trainer of a small Llama.

    before: processes hold parts of the model before Trainer is made.
    """
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=31)
    arguments = TrainingArguments(
        str(folder), report_to="none", disable_tqdm=True, learning_rate=1e-2, per_device_train_batch_size=2,
        max_steps=STEPS, save_steps=STEP, save_only_model=True, logging_steps=1, use_cpu=True,
        **options,
    )  # fmt: skip
    if options.get("fsdp"):
        spreads_on_a_cpu(arguments)
    torch.manual_seed(3)
    base = LlamaForCausalLM(LlamaConfig(**sizes))
    torch.manual_seed(seed)
    config = graft.LoraConfig(r=2, lora_dropout=0.4, target_modules=["q_proj", "up_proj"])
    model = graft.get_peft_model(base, config)
    if before:
        in_units(model)
    rows = [{"input_ids": (torch.arange(6) * (i + 1)) % 31, "labels": (torch.arange(6) + i) % 31} for i in range(20)]
    return Trainer(model, arguments, train_dataset=rows, callbacks=[callback])


def spreads_on_a_cpu(arguments: TrainingArguments) -> None:
    """Let accelerate do on CPUs what it does on GPUs alone: its FSDP2 begins where processes have a GPU each."""
    assert arguments.device.type == "cpu"
    AcceleratorState._reset_state()
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def outcome(t: Trainer, step: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    logged = [log["loss"] for log in t.state.log_history if "loss" in log and log["step"] > step]
    return logged, {n: v.clone() for n, v in graft.get_peft_model_state_dict(t.model).items()}


def goes_on(folder: Path, parts: bool = False, **options: Any) -> None:
    whole = trainer(folder / "whole", 0, Resumable(), **options)
    whole.train()
    assert all((layout_of(p) is not None) == parts for p in whole.model.parameters())
    losses, values = outcome(whole, STEP)
    watch = Resumable(folder / "whole" / f"checkpoint-{STEP}")
    again = trainer(folder / "again", 8, watch, **options)
    again.train(resume_from_checkpoint=str(folder / "whole" / f"checkpoint-{STEP}"))
    assert watch.resumed.step == STEP and watch.resumed.fresh == watch.resumed.missing == []
    found = outcome(again, STEP)
    assert found[0] == losses and len(losses) == STEPS - STEP, (found[0], losses)
    assert all(torch.equal(v, found[1][n]) for n, v in values.items()) and len(values) == 8


def untold(folder: Path) -> None:
    """Trainer would save such a model on its first process alone."""
    try:
        trainer(folder, 0, Resumable(), before=True)
    except ConfigError as e:
        assert "fsdp=True" in str(e)
    else:
        raise AssertionError("taken")


def checks(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    yield "ddp", lambda: goes_on(folder / "ddp")
    yield "untold", lambda: untold(folder / "untold")
    yield "fsdp2", lambda: goes_on(folder / "fsdp2", parts=True, **FSDP2)
    yield "fsdp2-before", lambda: goes_on(folder / "before", parts=True, before=True, **NO_WRAP)
