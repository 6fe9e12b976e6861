# SPDX-License-Identifier: Apache-2.0
"""Putting adapters on a model: the first, the second, on real memory and on meta, few modules and many."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

import graft
from benchmarks.measure import Bench, Effort, Goal, Row, Turns, take_turns
from benchmarks.models import Stack, lora, smollm, stack_config
from graft.core.lean import Linear, new_lean
from graft.core.random import kaiming_bound, skip_draws
from graft.inject.inject import pause_collector


def first(build: Callable[[], nn.Module], config: Callable[[Any], Any]) -> Callable[[Any], Turns]:
    def turns(lib: Any) -> Turns:
        while True:
            yield partial(lib.get_peft_model, build(), config(lib))

    return turns


def second(build: Callable[[], nn.Module], config: Callable[[Any], Any]) -> Callable[[Any], Turns]:
    def turns(lib: Any) -> Turns:
        while True:
            yield partial(lib.get_peft_model(build(), config(lib)).add_adapter, "second", config(lib))

    return turns


def least(build: Callable[[], nn.Module], modules: int, r: int = 16, device: str = "cpu") -> Callable[[], Turns]:
    """What no injection can do without: for each layer the bare modules that PEFT's names stand for, and in two of them
    a Parameter, with the values that PEFT's seed gives.

    PEFT draws A and B and then A again; here the first two are skipped, which is the fastest way past them.
    """

    def layer(rows: int, width: int) -> list[nn.Module]:
        A, B = torch.empty(r, width, device=device), torch.empty(rows, r, device=device)
        if device != "meta":
            skip_draws(A, B)
            bound = kaiming_bound(width)
            A.uniform_(-bound, bound)
            B.zero_()
        made: list[nn.Module] = [new_lean(Linear) for _ in range(modules)]
        for module, values in zip(made, (A, B)):
            module._parameters["weight"] = nn.Parameter(values)
        return made

    def turns() -> Turns:
        sizes = [(m.out_features, m.in_features) for m in build().modules() if isinstance(m, nn.Linear)]

        @pause_collector()
        def make() -> list[list[nn.Module]]:
            return [layer(*size) for size in sizes]

        while True:
            yield make

    return turns


FIRST, FURTHER = 7, 3  # modules of LoRA on a layer: three of each adapter, the layer itself and its containers


def blocks(n: int, device: str = "cpu") -> Callable[[], nn.Module]:
    return lambda: smollm(n, device, values=False)


@dataclass
class Growth:
    """How the CPU time of graft grows with the number of modules, relative to that number: 1 is linear."""

    what: str
    make: Callable[..., Callable[[Any], Turns]]
    goal: Goal = field(default_factory=lambda: Goal(over_floor=1.3))
    long: bool = False

    def run(self, effort: Effort) -> Row:
        few, many = 1_000, 3_000 if effort.quick else 10_000
        turns = {str(n): self.make(lambda n=n: Stack(n), stack_config)(graft) for n in (few, many)}
        values = take_turns(turns, effort)
        growth = statistics.median(values[str(many)]) / statistics.median(values[str(few)]) / (many / few)
        return Row(self.what, {"graft": [growth], "floor": [1.0]}, self.goal, unit="×")


# An injection finds each layer, puts another in its place, checks and reports: not more than twice what making the
# modules takes, so 3 × the floor where this is most of it. Where values are large, drawing them is nine tenths of it:
# 3 × the modules make 1.2, and memory that nobody has written to before, 0.3.
SMALL, LARGE = Goal(1, 3), Goal(1, 1.5)


def stack(n: int) -> Callable[[], nn.Module]:
    return lambda: Stack(n)


def inject(what: str, build: Callable[[], nn.Module], config: Any, goal: Goal, **options: Any) -> Bench:
    r = config(graft).r
    device = "meta" if what.endswith("meta") else "cpu"
    turns, modules = (second, FURTHER) if what.startswith("second") else (first, FIRST)
    return Bench(what, turns(build, config), goal, least(build, modules, r, device), **options)


BENCHES = [
    inject("inject, 224 linears", blocks(32), lora, LARGE),
    inject("inject, 560 linears", blocks(80), lora, LARGE, long=True),
    inject("inject, 560 linears, meta", blocks(80, "meta"), lora, SMALL),
    inject("inject, 1k modules", stack(1_000), stack_config, SMALL),
    inject("inject, 10k modules", stack(10_000), stack_config, SMALL, long=True, once=True),
    Growth("inject, growth with the model", first, long=True),
    inject("second adapter, 224 linears", blocks(32), lora, LARGE, long=True),
    inject("second adapter, 1k modules", stack(1_000), stack_config, SMALL),
    inject("second adapter, 10k modules", stack(10_000), stack_config, SMALL, long=True, once=True),
    Growth("second adapter, growth with the model", second),
]
