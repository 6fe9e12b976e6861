# SPDX-License-Identifier: Apache-2.0
"""The layouts: how each wraps a model, and how a training loop steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from graft.train.helpers import fsdp_auto_wrap_policy
from tests.distributed.methods import RATE

LAYOUTS: dict[str, Callable[[Any], Any]] = {}


def layout(name: str, **options: Any) -> Any:
    def add(function: Any) -> Any:
        LAYOUTS[name] = functools.partial(function, **options)
        return function

    return add


class Wrapped:
    """A model in a layout. `peft` is the PeftModel, `outer` what a training loop calls."""

    def __init__(self, peft: Any, outer: Any):
        self.peft, self.outer = peft, outer
        self.optimizer = self._optimizer()

    def _optimizer(self) -> Any:
        return torch.optim.SGD([p for p in self.outer.parameters() if p.requires_grad], lr=RATE)

    def step(self, batch: dict) -> float:
        loss = self.outer(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


class Engine(Wrapped):
    """DeepSpeed's engine."""

    def _optimizer(self) -> Any:
        return None

    def step(self, batch: dict) -> float:
        loss = self.outer(**batch).loss
        self.outer.backward(loss)
        self.outer.step()
        return float(loss.detach())


@layout("single")
def single(peft: Any) -> Wrapped:
    return Wrapped(peft, peft)


@layout("ddp")
def ddp(peft: Any, **options: Any) -> Wrapped:
    return Wrapped(peft, nn.parallel.DistributedDataParallel(peft, **options))


def in_units(model: Any, blocks: Any = None, **options: Any) -> Any:
    """Let FSDP2 have each block of a model of transformers, and what is left of it."""
    from torch.distributed.fsdp import fully_shard

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for block in base.model.layers if blocks is None else blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


@layout("fsdp2")
@layout("fsdp2-kept", reshard_after_forward=False)
@layout("fsdp2-checkpointing", checkpointing=True)
@layout("fsdp2-mixed", mixed=True)
@layout("fsdp2-offload", offload=True)
def fsdp2(
    peft: Any, checkpointing: bool = False, mixed: bool = False, offload: bool = False, **options: Any
) -> Wrapped:
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    if mixed:  # computing in float64 shows that graft goes along, and keeps the values comparable
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.float64, reduce_dtype=torch.float64)
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if checkpointing:
        peft.get_base_model().gradient_checkpointing_enable(dict(use_reentrant=False))
    return Wrapped(peft, in_units(peft, **options))


def _fsdp1(peft: Any, **options: Any) -> Wrapped:
    from torch.distributed.fsdp import FullyShardedDataParallel

    policy = fsdp_auto_wrap_policy(peft)
    return Wrapped(
        peft, FullyShardedDataParallel(peft, auto_wrap_policy=policy, device_id=torch.device("cpu"), **options)
    )


LAYOUTS["fsdp1"] = functools.partial(_fsdp1, use_orig_params=True)
LAYOUTS["fsdp1-flat"] = functools.partial(_fsdp1, use_orig_params=False)


def _zero(peft: Any, stage: int, make: Any = None) -> Engine:
    import deepspeed

    config = dict(
        train_micro_batch_size_per_gpu=2, zero_optimization=dict(stage=stage, stage3_param_persistence_threshold=0),
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,
    )  # fmt: skip
    trained = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=RATE) if make is None else make(trained)
    engine = deepspeed.initialize(model=peft, config=config, optimizer=optimizer)[0]
    return Engine(peft, engine)


LAYOUTS["zero2"] = functools.partial(_zero, stage=2)
LAYOUTS["zero3"] = functools.partial(_zero, stage=3)


def mean(value: float) -> float:
    """The mean of a number over all processes."""
    t = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(t)
    return float(t / dist.get_world_size())
