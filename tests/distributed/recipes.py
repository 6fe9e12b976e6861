# SPDX-License-Identifier: Apache-2.0
"""The recipes of docs/distributed.md, as they stand there."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

import graft
from tests.distributed.methods import base, batch
from tests.docs import blocks as pages

PAGE = pages.ROOT / "docs" / "distributed.md"
AT_LOAD = ("sharded-trainer", "sharded-loop")  # followed by sharded_loops.py, on a base in a folder
OF = {"ddp": ["ddp", "ddp-two"], "fsdp2": ["fsdp2"], "fsdp1": ["fsdp1"], "zero2": ["deepspeed"], "zero3": ["deepspeed"]}


def blocks(language: str) -> list[str]:
    """Return the page's blocks of a language, without those that run on the page."""
    return [b.text for b in pages.blocks(PAGE, language) if language != "python" or b.mark == "run by"]


def python(name: str) -> str:
    """The block that begins with its name."""
    (found,) = [text for text in blocks("python") if text.startswith(f"# {name}\n")]
    return found


def follow_at_load(name: str, path: str, folder: str) -> dict[str, Any]:
    """Do what a recipe for a base that is sharded at load says, and return its names. path: of the base."""
    (text,) = [b.text for b in pages.blocks(PAGE, "python") if b.text.startswith("# sharded\n")]
    part = [row[dist.get_rank() :: dist.get_world_size()] for row in batch().values()]
    held: dict[str, Any] = {
        "path": path,
        "folder": folder,
        "rows": [dict(zip(batch(), row)) for row in zip(*batch().values())] * 4,
        "loader": [dict(zip(batch(), part))] * 3,
    }
    exec("".join(line for line in text.splitlines(True) if "init_process_group" not in line), held)
    exec(python(name), held)
    dist.barrier()
    return held


def deepspeed_config(stage: int) -> dict[str, Any]:
    (text,) = blocks("json")
    config: dict[str, Any] = json.loads(text)
    config["zero_optimization"]["stage"] = stage
    return config | {"zero_force_ds_cpu_optimizer": False}  # for the CPUs of the tests


def follow(name: str, layout: str, folder: str) -> None:
    """Do what a recipe says, take a step, save on all processes, and load the file."""
    held: dict[str, Any] = {"graft": graft, "base": base(), "device": torch.device("cpu")}
    if layout.startswith("zero"):
        held["config"] = deepspeed_config(int(layout[-1]))
    setup = "".join(line for line in python("setup").splitlines(True) if "init_process_group" not in line)
    exec(setup, held)
    held["model"].train()
    exec(python(name), held)
    model, wrapped = held["model"], held["wrapped"]
    loss = wrapped(**batch(dist.get_rank(), dist.get_world_size())).loss
    wrapped.backward(loss) if layout.startswith("zero") else loss.backward()
    step = wrapped if layout.startswith("zero") else held.get("optimizer")
    if step is not None:
        step.step()
    if name == "ddp-two":
        model.set_adapter("b")
        model.set_requires_grad(["default", "b"])
        wrapped(**batch(dist.get_rank(), dist.get_world_size())).loss.backward()
    model.save_pretrained(folder)
    dist.barrier()
    graft.PeftModel.from_pretrained(base(), folder)
    whole = graft.get_peft_model_state_dict(model)
    served = graft.adapter_tensors(model, layout="vllm")
    alone = layout.startswith(("ddp", "zero2")) or dist.get_rank() == 0  # others hold parts
    assert len(served.tensors) == (len(whole) if alone else 0) and bool(served.digest) == alone
    for key, t in served.tensors.items():
        scaling = model.peft_config["default"].lora_alpha / model.peft_config["default"].r
        torch.testing.assert_close(t, whole[key] * (scaling if "lora_B" in key else 1))
    if name == "fsdp2":
        assert any(v.any() for k, v in whole.items() if "lora_B" in k), "the optimizer took a step"
