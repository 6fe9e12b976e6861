# SPDX-License-Identifier: Apache-2.0
"""Bad input on sharded bases: every process gets an error with the remedy, nothing has changed, and nobody hangs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import graft
from graft.core.errors import CheckpointError, DistributedError
from tests.distributed.layouts import in_units
from tests.distributed.sharded_bases import (
    METHODS,
    STEPS,
    WAYS,
    adapted,
    load,
    logits,
    lora,
    near,
    own_seed,
    place,
    rows,
    save,
    step,
    trainable,
    whole_batch,
    write_bases,
)
from tests.distributed.tensor_parallel import close, held, refused, same_on_all

FSDP = WAYS["fsdp"]


def unchanged(model: nn.Module, act: Callable[[], Any], error: Any, *words: str) -> None:
    """An act is refused, and leaves the model as it was."""

    def look() -> list[tuple[str, type, bool]]:
        return [(name, type(p), p.requires_grad) for name, p in model.named_parameters()]

    before, modules = look(), list(model.modules())
    refused(act, error, *words)
    assert look() == before and list(model.modules()) == modules and not hasattr(model, "peft_config")


def wrapped_by_fsdp1(folder: Path) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    base = load(folder, None, "llama")
    inner = FullyShardedDataParallel(base, use_orig_params=True, device_id=torch.device("cpu"))
    act = partial(graft.get_peft_model, inner, lora())
    unchanged(inner, act, DistributedError, "before", "FullyShardedDataParallel", "fully_shard")


def other_files(folder: Path) -> None:
    """Each process has a file of its own: named, before anything is injected."""
    own = folder / f"rank{dist.get_rank()}" / "other files"
    one = adapted(folder, None, lora(), "llama")
    with torch.no_grad():
        for p in trainable(one):
            p.add_(dist.get_rank())
    save(one, None, own)
    for trains in (True, False):
        base = load(folder, FSDP)
        act = partial(graft.PeftModel.from_pretrained, base, own, is_trainable=trains)
        unchanged(base, act, CheckpointError, "rank(s) [1]", "same file")


def other_configs(folder: Path) -> None:
    """Processes with other ranks, targets or methods."""
    first = lora()
    for other in (
        graft.LoraConfig(r=8, target_modules=first.target_modules),
        graft.LoraConfig(r=4, target_modules=["q_proj"]),
        METHODS["LOHA"](),
    ):
        base = load(folder, FSDP)
        config = other if dist.get_rank() else first
        unchanged(base, partial(graft.get_peft_model, base, config), (DistributedError, CheckpointError), "process")


def alone(folder: Path) -> None:
    """A process that comes alone gets an error that says who is missing; then all may come."""
    base = load(folder, FSDP)
    if dist.get_rank() == 0:
        unchanged(base, partial(graft.get_peft_model, base, lora()), (DistributedError, CheckpointError), "alone")
    dist.barrier()
    torch.manual_seed(own_seed())
    model = graft.get_peft_model(base, lora()).train()
    for _ in range(STEPS):
        step(model, rows(FSDP))
    same_on_all(held(model))


def in_ddp(folder: Path) -> None:
    """DDP around a base whose adapters are averaged already."""
    model = adapted(folder, FSDP, lora())

    def act() -> None:
        wrapped = nn.parallel.DistributedDataParallel(model, init_sync=False)
        wrapped(**rows(FSDP)).loss.backward()

    refused(act, DistributedError, "average")


def rows_without(folder: Path) -> None:
    """A process whose rows all lack adapters, while others train: an error on all, and no waiting."""
    model = adapted(folder, FSDP, lora())
    n = len(rows(FSDP)["input_ids"])
    names = ["__base__" if dist.get_rank() else "default"] * n

    def act() -> None:
        model(**rows(FSDP), adapter_names=names).loss.backward()

    refused(act, DistributedError, "rank(s) [1]", "row")


def resumed_elsewhere(folder: Path) -> None:
    """A training at load's layout goes on in the one made by hand, to the bit."""
    path = place(folder, FSDP, "elsewhere")
    models = []
    for way in (FSDP, WAYS["hand"]):
        model = adapted(folder, way, lora())
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        models.append((way, model, optimizer))

    def train(way: Any, model: Any, optimizer: Any) -> float:
        loss = model(**rows(way)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    for _ in range(2):
        train(*models[0])
    graft.save_training(path, models[0][1], models[0][2], step=2)
    dist.barrier()
    graft.resume(path, models[1][1], models[1][2])
    for _ in range(2):
        assert train(*models[0]) == train(*models[1])
    ends = [held(model) for _, model, _ in models]
    assert all(torch.equal(t, ends[1][key]) for key, t in ends[0].items())


def part_of_world(folder: Path) -> None:
    """Two meshes of two processes in a world of four: each pair has a model, and waits for nobody else."""
    from torch.distributed.device_mesh import init_device_mesh

    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("model", "shard"))
    pair, index = pairs.get_local_rank("model"), pairs.get_local_rank("shard")
    one = adapted(folder, None, lora(), "llama")
    expected = [step(one, rows(None)) for _ in range(STEPS)]
    if pair == 0:
        base = in_units(load(folder, None, "llama"), mesh=pairs["shard"])
        torch.manual_seed(own_seed())
        model = graft.get_peft_model(base, lora()).train()
        whole = whole_batch()
        batch = {key: t[2 * index : 2 * index + 2] for key, t in whole.items()}
        taken = [step(model, batch) for _ in range(STEPS)]
        for (loss, norm), (a, b) in zip(taken, expected):
            both = torch.tensor(loss, dtype=torch.float64)
            dist.all_reduce(both, group=pairs["shard"].get_group())
            assert near(float(both) / 2, a) and near(norm, b), (taken, expected)
        for key, t in held(one).items():
            close(held(model)[key], t)
        close(logits(model), logits(one), 1e-5)
        path = folder / "pair"
        model.save_pretrained(path)
    dist.barrier()


def offloaded(folder: Path) -> None:
    """Units whose weights lie on the CPU between calls; here calls run there as well."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    base = in_units(load(folder, None, "llama"), offload_policy=CPUOffloadPolicy(pin_memory=False))
    torch.manual_seed(own_seed())
    model = graft.get_peft_model(base, lora()).train()
    one = adapted(folder, None, lora(), "llama")
    for _ in range(STEPS):
        expected = step(one, rows(None))
        assert near(step(model, rows(WAYS["hand"]))[1], expected[1])
    for key, t in held(one).items():
        close(held(model)[key], t)
    same_on_all(held(model))


TWO: dict[str, Callable[[Path], None]] = {
    "FSDP1": wrapped_by_fsdp1,
    "other files": other_files,
    "other configs": other_configs,
    "alone": alone,
    "DDP": in_ddp,
    "rows without": rows_without,
    "resumed elsewhere": resumed_elsewhere,
    "offloaded": offloaded,
}
FOUR: dict[str, Callable[[Path], None]] = {"part of the world": part_of_world}


def checks(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    write_bases(folder)
    for name, check in (TWO if dist.get_world_size() == 2 else FOUR).items():
        yield name, partial(check, folder)
