# SPDX-License-Identifier: Apache-2.0
"""Trainer and accelerate with a base that was sharded before its adapter came, against Trainer on one process.

The run of one process comes first, and leaves its numbers for that of two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import graft
import graft.compat.peft

graft.compat.peft.install()  # so that Trainer saves adapters alone; only processes of these checks import this module

from safetensors.torch import load_file
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from graft.train import Resumable
from tests.distributed import recipes
from tests.distributed.sharded_bases import (
    ATTENTION,
    FILE,
    WAYS,
    adapted,
    load,
    near,
    own_seed,
    rows,
    same_file,
    step,
    write_bases,
)
from tests.distributed.tensor_parallel import held, same_on_all
from tests.models import seeded

ROWS, STEPS = 24, 3


def dataset() -> list[dict[str, torch.Tensor]]:
    """Return rows whose labels are of different lengths."""
    with seeded(9):
        ids = torch.randint(1, 40, (ROWS, 10))
    out = []
    for i, row in enumerate(ids):
        labels = row.clone()
        labels[3 + i % 7 :] = -100
        out.append(dict(input_ids=row, labels=labels))
    return out


class InOrder(Trainer):
    """A Trainer that takes rows in order."""

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset)


def train(folder: Path, way: Any, path: Path, **options: Any) -> tuple[Any, list[dict[str, float]]]:
    arguments = TrainingArguments(
        str(path), report_to="none", disable_tqdm=True, learning_rate=1e-2, max_grad_norm=0.3, max_steps=STEPS,
        per_device_train_batch_size=4 // dist.get_world_size(), gradient_accumulation_steps=2, logging_steps=1,
        save_steps=STEPS, save_only_model=True, use_cpu=True, lr_scheduler_type="constant", **options,
    )  # fmt: skip
    config = graft.LoraConfig(r=4, target_modules=ATTENTION, modules_to_save=["lm_head"])
    model = adapted(folder, way, config, "llama")
    trainer = InOrder(model, arguments, train_dataset=dataset())
    trainer.train()
    logged = [log for log in trainer.state.log_history if "loss" in log]
    return trainer, [dict(loss=log["loss"], norm=float(log["grad_norm"])) for log in logged]


def with_trainer(folder: Path, optimizer: str) -> None:
    """Losses, norms and the checkpoint's file are those of one process."""
    place = folder.parent / "one" / optimizer
    if dist.get_world_size() == 1:
        trainer, logged = train(folder, None, place, optim=optimizer)
        torch.save(logged, place / "logged.pt")
        return
    trainer, logged = train(folder, WAYS["fsdp"], folder / optimizer, optim=optimizer)
    dist.barrier()
    expected = torch.load(place / "logged.pt")
    assert len(logged) == STEPS
    for here, one in zip(logged, expected, strict=True):
        assert near(here["loss"], one["loss"], 2e-6) and near(here["norm"], one["norm"], 2e-6), (logged, expected)
    same_on_all(held(trainer.model))
    checkpoint = f"checkpoint-{STEPS}"
    files = [load_file(p / checkpoint / FILE) for p in (folder / optimizer, place)]
    same_file(files[0], files[1], 2e-6)


def resumes(folder: Path) -> None:
    """Trainer with `Resumable`: a resumed training has the bits of one that went on, with dropout."""
    if dist.get_world_size() == 1:
        return
    ends, logs = [], []
    checkpoint = folder / "resumes" / "checkpoint-2"
    for name, seed in (("resumes", 0), ("again", 40)):
        config = graft.LoraConfig(r=4, lora_dropout=0.3, target_modules=ATTENTION)
        model = adapted(folder, WAYS["fsdp"], config)
        torch.manual_seed(seed + dist.get_rank())
        watch = Resumable(checkpoint if seed else None)
        arguments = TrainingArguments(
            str(folder / name), report_to="none", disable_tqdm=True, learning_rate=1e-2, max_steps=4, use_cpu=True,
            per_device_train_batch_size=2, save_steps=2, logging_steps=1, save_only_model=True, seed=seed,
        )  # fmt: skip
        trainer = InOrder(model, arguments, train_dataset=dataset(), callbacks=[watch])
        trainer.train(resume_from_checkpoint=str(checkpoint) if seed else None)
        dist.barrier()
        ends.append(held(trainer.model))
        logs.append([log["loss"] for log in trainer.state.log_history if "loss" in log and log["step"] > 2])
    assert logs[0] == logs[1] and len(logs[0]) == 2, logs
    assert all(torch.equal(t, ends[1][key]) for key, t in ends[0].items())
    same_on_all(ends[1])


def with_accelerate(folder: Path) -> None:
    """accelerate shards the base by its FSDP2 plugin; the adapter comes afterwards."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    if dist.get_world_size() == 1:
        return
    AcceleratorState._reset_state()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"]
    )
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # FSDP begins where each has a GPU
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    base = fsdp2_prepare_model(accelerator, load(folder, None, "llama"))
    assert all(hasattr(p, "device_mesh") for p in base.parameters())
    torch.manual_seed(own_seed())
    config = graft.LoraConfig(r=4, target_modules=ATTENTION)
    model = graft.get_peft_model(base, config).train()
    one = adapted(folder, None, config, "llama")
    for _ in range(STEPS):
        expected = step(one, rows(None))
        assert near(step(model, rows(WAYS["hand"]))[1], expected[1])
    same_on_all(held(model))
    same_file(held(model), held(one))


def follows_recipe(folder: Path, name: str) -> None:
    """A recipe of docs/distributed.md trains one adapter on all processes, and its file loads on one."""
    if dist.get_world_size() == 1:
        return
    if dist.get_rank() == 0:
        recipes.base().save_pretrained(folder / "recipe")
    dist.barrier()
    saved = folder / name
    model = recipes.follow_at_load(name, str(folder / "recipe"), str(saved))["model"]
    same_on_all(held(model))
    assert all(t.any() for key, t in held(model).items() if "lora_B" in key), "the optimizer took a step"
    one = graft.PeftModel.from_pretrained(recipes.base(), saved)
    same_file(held(one), held(model), 0)


CHECKS: dict[str, Callable[[Path], None]] = {
    "Trainer": partial(with_trainer, optimizer="sgd"),
    "Trainer AdamW": partial(with_trainer, optimizer="adamw_torch"),
    "Resumable": resumes,
    "accelerate": with_accelerate,
    **{name: partial(follows_recipe, name=name) for name in recipes.AT_LOAD},
}


def checks(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    write_bases(folder)
    for name, check in CHECKS.items():
        yield name, partial(check, folder)
