# SPDX-License-Identifier: Apache-2.0
"""A training step on bitsandbytes' NF4, the bytes it keeps, and the peak of the process.

In processes of their own: where bitsandbytes is found, every import of transformers takes seconds longer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import nn

import graft
from benchmarks.measure import LIBS, Effort, Goal, Row, take_turns
from benchmarks.memory import NO_HOLES
from benchmarks.methods import EVEN, EVERY, FLAT, moved
from benchmarks.models import LINEAR, SCALING, lora, smollm
from benchmarks.training import inputs, kept, step

PACKAGE = Path(sys.prefix) / "packages" / "bitsandbytes"  # where `make bench` puts it
MANY = 8  # layers where memory is that of the process


@dataclass
class Case:
    name: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    right: bool = True  # PEFT's adapter does what it is to do on this storage

    def make(self, lib: Any, layers: int) -> nn.Module:
        made = getattr(lib, self.config)(**EVERY, **self.options)
        return moved(lib.get_peft_model(base(layers), made)).train()

    def libs(self) -> dict[str, Any]:
        return LIBS if self.right else {"graft": graft}


CASES = [
    Case("LoRA r 16", "LoraConfig", dict(r=16, lora_alpha=SCALING * 16)),
    Case("DoRA r 16", "LoraConfig", dict(r=16, lora_alpha=SCALING * 16, use_dora=True)),
    Case("OFT block 32", "OFTConfig", dict(oft_block_size=32)),
    Case("LoHa r 8", "LoHaConfig", dict(r=8, alpha=SCALING * 8), right=False),
    Case("HiRA r 32", "HiraConfig", dict(r=32)),
]


def base(layers: int) -> nn.Module:
    """A model whose linear layers are in NF4, marked as transformers marks it."""
    from bitsandbytes.nn import Linear4bit

    model = smollm(layers).requires_grad_(False)
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in LINEAR:
            made = Linear4bit(module.in_features, module.out_features, False, torch.float32, quant_type="nf4")
            made.load_state_dict(module.state_dict())
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, made.to("cpu"))
    model.is_loaded_in_4bit = model.is_quantized = True  # type: ignore[assignment]
    return model.train()


def floor(layers: int) -> nn.Module:
    return moved(graft.get_peft_model(base(layers), lora(graft))).train()


def models(case: Case, layers: int) -> dict[str, Callable[[], nn.Module]]:
    made: dict[str, Callable[[], nn.Module]] = {"floor": partial(floor, layers)}
    return {who: partial(case.make, lib, layers) for who, lib in case.libs().items()} | made


def steps(case: Case, quick: bool) -> dict[str, list[float]]:
    batch = inputs(torch.float32)
    turns = {who: repeat(partial(step, make(), batch)) for who, make in models(case, 1).items()}
    return take_turns(turns, Effort(quick))


def held(case: Case, quick: bool) -> dict[str, list[float]]:
    return {who: [kept(make(), inputs(torch.float32))] for who, make in models(case, 1).items()}


def peaks(case: Case, quick: bool) -> dict[str, list[float]]:
    return {who: [child("peak", case.name, quick, who, **NO_HOLES)] for who in models(case, 1)}


def peak(case: Case, who: str) -> float:
    """Return the bytes of the process at the peak of a step, above those before it: both libraries are imported, but
    only graft loads more modules of its own where they are used."""
    model, batch = models(case, MANY)[who](), inputs(torch.float32)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # count from here
    step(model, batch)
    return resident("VmHWM") - before


def resident(which: str) -> float:
    """Return a size of this process in memory, in bytes: "VmRSS" now, "VmHWM" at its peak."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return float(int(status[which].split()[0]) * 1024)


def child(what: str, *arguments: Any, **environment: str) -> Any:
    """Run `python -m benchmarks.packed` where bitsandbytes is found; return what it prints."""
    env = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join([str(PACKAGE), *sys.path])}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.packed", what, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


@dataclass
class Packed:
    """A row of a case: what it measures in a process of its own."""

    title: str
    how: str
    case: Case
    goal: Goal
    unit: str = "s"
    long: bool = True

    @property
    def what(self) -> str:
        return f"{self.title}, {self.case.name} on NF4"

    def run(self, effort: Effort) -> Row:
        return Row(self.what, child(self.how, self.case.name, effort.quick), self.goal, unit=self.unit)


BENCHES = [
    bench
    for case in CASES
    for bench in (
        Packed("step", "steps", case, Goal(EVEN if case.right else None)),
        Packed("bytes kept", "held", case, Goal(FLAT if case.right else None), "B"),
        Packed("peak memory", "peaks", case, Goal(FLAT if case.right else None), "B"),
    )
]

if __name__ == "__main__":
    how, name, quick, *who = sys.argv[1:]
    torch.set_num_threads(1)
    chosen = next(case for case in CASES if case.name == name)
    result = peak(chosen, *who) if how == "peak" else globals()[how](chosen, quick == "True")
    print(json.dumps(result))
