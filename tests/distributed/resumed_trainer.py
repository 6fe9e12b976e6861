# SPDX-License-Identifier: Apache-2.0
"""Check that processes run: Trainer with `graft.train.Resumable`, on a model in the layout of GRAFT_RESUMED.

accelerate spreads models on a CPU in no way but copies: its state is told what it would have on GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import graft
from graft.train import Resumable

LAYOUT = os.environ.get("GRAFT_RESUMED", "")
STEPS, STEP = 6, 3
ZERO3 = dict(
    train_micro_batch_size_per_gpu="auto", gradient_accumulation_steps="auto", gradient_clipping="auto",
    zero_optimization=dict(stage=3, stage3_param_persistence_threshold=0), zero_force_ds_cpu_optimizer=False,
    zero_allow_untested_optimizer=True,
)  # fmt: skip


class Spread(Trainer):
    """Trainer with FSDP2 on a CPU."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if LAYOUT == "fsdp2":
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="FULL_STATE_DICT",
                cpu_ram_efficient_loading=False, transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            )  # fmt: skip
            AcceleratorState._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
            self.is_fsdp_enabled = True


def trainer(folder: Path, seed: int, callback: Any) -> Trainer:
    AcceleratorState._reset_state()
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=31)
    options = dict(deepspeed=ZERO3) if LAYOUT == "zero3" else dict(use_cpu=True)
    arguments = TrainingArguments(
        str(folder), report_to="none", disable_tqdm=True, learning_rate=1e-2, per_device_train_batch_size=2,
        max_steps=STEPS, save_steps=STEP, remove_unused_columns=False, save_only_model=True, logging_steps=1, **options,
    )  # fmt: skip
    torch.manual_seed(3)
    base = LlamaForCausalLM(LlamaConfig(**sizes))
    torch.manual_seed(seed)
    config = graft.LoraConfig(r=2, lora_dropout=0.4, target_modules=["q_proj", "up_proj"])
    model = graft.get_peft_model(base, config)
    rows = [{"input_ids": (torch.arange(6) * (i + 1)) % 31, "labels": (torch.arange(6) + i) % 31} for i in range(20)]
    return Spread(model, arguments, train_dataset=rows, callbacks=[callback])


def outcome(t: Trainer, step: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    logged = [log["loss"] for log in t.state.log_history if "loss" in log and log["step"] > step]
    return logged, {n: v.clone() for n, v in graft.get_peft_model_state_dict(t.model).items()}


def goes_on(folder: Path) -> None:
    whole = trainer(folder / "whole", 0, Resumable())
    whole.train()
    losses, values = outcome(whole, STEP)
    watch = Resumable()
    again = trainer(folder / "again", 8, watch)
    again.train(resume_from_checkpoint=str(folder / "whole" / f"checkpoint-{STEP}"))
    assert watch.resumed.step == STEP and watch.resumed.fresh == watch.resumed.missing == []
    found = outcome(again, STEP)
    assert found[0] == losses and len(losses) == STEPS - STEP, (found[0], losses)
    assert all(torch.equal(v, found[1][n]) for n, v in values.items()) and len(values) == 8


def checks(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    yield LAYOUT, lambda: goes_on(folder)
