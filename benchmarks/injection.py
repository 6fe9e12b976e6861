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
from benchmarks.models import LINEAR, Stack, lora, smollm, stack_config
from graft.core.lean import Linear, bare
from graft.core.random import kaiming_bound, skip
from graft.inject.inject import collector_paused


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


def two_parameters(n: int, device: str = "cpu") -> Callable[[], Turns]:
    """What no injection can do without: two Parameters for each layer, with the values that PEFT's seed gives them.

    PEFT draws A and B and then A again; here the first two are skipped, which is the fastest way past them.
    """

    def turns() -> Turns:
        base = smollm(n // len(LINEAR), "meta")
        sizes = [(m.out_features, m.in_features) for m in base.modules() if isinstance(m, nn.Linear)]

        def pair(rows: int, width: int) -> tuple[nn.Parameter, nn.Parameter]:
            A, B = torch.empty(16, width, device=device), torch.empty(rows, 16, device=device)
            if device != "meta":
                skip(A)
                skip(B)
                bound = kaiming_bound(width)
                A.uniform_(-bound, bound)
                B.zero_()
            return nn.Parameter(A), nn.Parameter(B)

        @collector_paused()
        def make() -> list:
            return [pair(*size) for size in sizes]

        while True:
            yield make

    return turns


def skeleton(n: int, modules: int, width: int = 4, r: int = 2) -> Callable[[], Turns]:
    """What the names of `n` adapted layers stand for: bare modules, of which two hold a Parameter."""

    @collector_paused()
    def make() -> list:
        made = []
        for _ in range(n):
            new = [bare(Linear) for _ in range(modules)]
            new[0]._parameters["weight"] = nn.Parameter(torch.rand(r, width))
            new[1]._parameters["weight"] = nn.Parameter(torch.zeros(width, r))
            made.append(new)
        return made

    def turns() -> Turns:
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


BENCHES = [
    Bench("inject, 224 linears", first(blocks(32), lora), Goal(faster=10), two_parameters(224)),
    Bench("inject, 560 linears", first(blocks(80), lora), Goal(faster=10), two_parameters(560), long=True),
    Bench("inject, 560 linears, meta", first(blocks(80, "meta"), lora), Goal(faster=20), two_parameters(560, "meta")),
    Bench("inject, 1k modules", first(lambda: Stack(1_000), stack_config), Goal(faster=10), skeleton(1_000, FIRST)),
    Bench(
        "inject, 10k modules",
        first(lambda: Stack(10_000), stack_config),
        Goal(faster=25),
        skeleton(10_000, FIRST),
        long=True,
        once=True,
    ),
    Growth("inject, growth with the model", first, long=True),
    Bench("second adapter, 224 linears", second(blocks(32), lora), Goal(faster=20), two_parameters(224), long=True),
    Bench(
        "second adapter, 1k modules",
        second(lambda: Stack(1_000), stack_config),
        Goal(faster=50),
        skeleton(1_000, FURTHER),
    ),
    Bench(
        "second adapter, 10k modules",
        second(lambda: Stack(10_000), stack_config),
        Goal(faster=300),
        skeleton(10_000, FURTHER),
        long=True,
        once=True,
    ),
    Growth("second adapter, growth with the model", second),
]
