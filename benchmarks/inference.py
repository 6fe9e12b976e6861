# SPDX-License-Identifier: Apache-2.0
"""Forward passes without gradients: prefill, decode, and batches whose rows use different adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Bench, Goal, Turns
from benchmarks.models import WIDTH, lora, randomize, smollm

LAYERS = 4


def embeddings(batch: int, tokens: int) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(batch, tokens, WIDTH)


def repeat(model: nn.Module, x: Tensor, calls: int, **options: Any) -> Turns:
    def run() -> None:
        with torch.inference_mode():
            for _ in range(calls):
                model(inputs_embeds=x, use_cache=False, **options)

    while True:
        yield run


def single(batch: int, tokens: int, calls: int) -> Callable[[Any], Turns]:
    def turns(lib: Any) -> Turns:
        model = randomize(lib.get_peft_model(smollm(LAYERS), lora(lib))).eval()
        return repeat(model, embeddings(batch, tokens), calls)

    return turns


def mixed(batch: int, tokens: int, adapters: int, calls: int) -> Callable[[Any], Turns]:
    def turns(lib: Any) -> Turns:
        names = [f"a{i}" for i in range(adapters)]
        model = lib.get_peft_model(smollm(LAYERS), lora(lib), names[0])
        for name in names[1:]:
            model.add_adapter(name, lora(lib))
        rows = [names[i % adapters] for i in range(batch)]
        return repeat(randomize(model).eval(), embeddings(batch, tokens), calls, adapter_names=rows)

    return turns


def base(batch: int, tokens: int, calls: int) -> Callable[[], Turns]:
    return lambda: repeat(smollm(LAYERS), embeddings(batch, tokens), calls)


def bench(what: str, turns: Any, shape: tuple[int, int], calls: int, goal: Goal, *adapters: int) -> Bench:
    long = max(adapters, default=4) != 4  # PEFT takes a while to load many, and one is less of interest
    return Bench(what, turns(*shape, *adapters, calls), goal, base(*shape, calls), calls, long)


BENCHES = [
    bench("prefill 512 (floor: the base)", single, (1, 512), 1, Goal(1.0, 1.08)),
    bench("decode", single, (1, 1), 30, Goal(1.0, 1.12)),
    bench("mixed batch 16 × 1, 1 adapter", mixed, (16, 1), 20, Goal(over_floor=1.15), 1),
    bench("mixed batch 16 × 1, 4 adapters", mixed, (16, 1), 20, Goal(over_floor=1.25), 4),
    bench("mixed batch 16 × 1, 16 adapters", mixed, (16, 1), 20, Goal(over_floor=1.5), 16),
    bench("mixed batch 64 × 1, 64 adapters", mixed, (64, 1), 5, Goal(1, 1.85), 64),
    bench("mixed batch 16 × 16, 16 adapters", mixed, (16, 16), 3, Goal(over_floor=1.15), 16),
]
