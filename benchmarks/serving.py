# SPDX-License-Identifier: Apache-2.0
"""Many adapters on one model: batches through slots, and an adapter swapped in place."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import cycle
from threading import Lock
from typing import Any

import torch
from torch import Tensor

import graft
from benchmarks.files import FOLDER, checked, saved
from benchmarks.inference import LAYERS, base, embeddings, mixed
from benchmarks.measure import Bench, Effort, Goal, Row, Turns, take_turns
from benchmarks.models import LINEAR, SCALING, lora, randomize, smollm
from graft.core.gate import Gate
from graft.serving import AdapterSlots

SLOTS = 100
TIMES = 10_000


@cache
def slots() -> AdapterSlots:
    """A model with a hundred adapters in slots."""
    made = AdapterSlots(smollm(LAYERS), SLOTS, 16, list(LINEAR))
    model = randomize(graft.get_peft_model(smollm(LAYERS), lora(graft)))
    for i in range(SLOTS):
        made.load(f"a{i}", model)
    made.pin(*made.names)
    return made


def served(batch: int, tokens: int, adapters: int, calls: int, fresh: bool = False) -> Callable[[Any], Turns]:
    """`fresh`: every call has another mix, so nothing that was gathered can be used again."""

    def turns(lib: Any) -> Turns:
        if lib is not graft:
            yield from mixed(batch, tokens, adapters, calls)(lib)
        x, names = embeddings(batch, tokens), [f"a{i % adapters}" for i in range(batch)]

        def run() -> None:
            with torch.inference_mode():
                for _ in range(calls):
                    if fresh:
                        names.append(names.pop(0))
                    slots()(inputs_embeds=x, use_cache=False, adapter_names=names)

        while True:
            yield run

    return turns


@cache
def another() -> str:
    """A folder with an adapter of the shapes of `saved()` and other values."""
    folder = os.path.join(FOLDER.name, "another")
    model = randomize(graft.get_peft_model(smollm(), lora(graft)))
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.mul_(SCALING)
    model.save_pretrained(folder)
    return folder


def hotswap(lib: Any) -> Turns:
    swap = lib.hotswap_adapter if lib is graft else import_module("peft.utils.hotswap").hotswap_adapter
    model = lib.PeftModel.from_pretrained(smollm(), saved())
    for folder in cycle([another(), saved()]):
        yield lambda folder=folder: swap(model, folder, "default")


def read_and_copy() -> Turns:
    targets: dict[str, Tensor] = {}
    for folder in cycle([another(), saved()]):

        def run(folder: str = folder) -> None:
            nonlocal targets
            values = checked(folder)
            targets = targets or {key: v.clone() for key, v in values.items()}
            torch._foreach_copy_([targets[key] for key in values], list(values.values()))

        yield run


@dataclass
class Passing:
    """A row of what an empty block costs that a call is in: the gate's, and a lock's."""

    what: str
    goal: Goal
    long: bool = False

    def run(self, effort: Effort) -> Row:
        gate, lock = Gate(), Lock()
        turns = {"graft": passed(lambda: gate.call("forward")), "floor": passed(lambda: lock)}
        values = take_turns(turns, effort)
        return Row(self.what, {who: [v / TIMES for v in vs] for who, vs in values.items()}, self.goal)


def passed(block: Callable[[], Any]) -> Turns:
    def run() -> None:
        for _ in range(TIMES):
            with block():
                pass

    while True:
        yield run


def bench(what: str, shape: tuple[int, int], adapters: int, calls: int, goal: Goal, **options: Any) -> Bench:
    turns = served(*shape, adapters, calls, **options)
    return Bench(what, turns, goal, base(*shape, calls), calls, long=True)  # PEFT takes a while to load so many


BENCHES = [
    bench("slots 16 × 1, 16 adapters (floor: the base)", (16, 1), 16, 20, Goal(over_floor=1.5)),
    bench("slots 16 × 1, 16 adapters, another mix each time", (16, 1), 16, 20, Goal(1.0), fresh=True),
    bench("slots 64 × 1, 64 adapters", (64, 1), 64, 5, Goal(1, 1.85)),
    Passing("gate of a call that nobody holds up (floor: a lock)", Goal(over_floor=5)),
    # nothing is made: names of 420 tensors, and a config
    Bench("hotswap_adapter (floor: read, check, copy)", hotswap, Goal(1, 1.2), read_and_copy),
]
