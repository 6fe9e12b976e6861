# SPDX-License-Identifier: Apache-2.0
"""LoRA on the stacks of a mixture of experts, of which tokens use a few. The floor: the frozen base."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralModel

from benchmarks.measure import Bench, Goal, Turns
from benchmarks.models import SCALING, randomize
from benchmarks.training import step

WIDTH, EXPERTS, USED = 256, 32, 2
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


def base() -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(hidden_size=WIDTH, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4)
    experts = dict(num_key_value_heads=2, num_local_experts=EXPERTS, num_experts_per_tok=USED)
    return MixtralModel(MixtralConfig(vocab_size=64, **sizes, **experts)).requires_grad_(False)


def adapted(lib: Any) -> nn.Module:
    config = lib.LoraConfig(r=8, lora_alpha=8 * SCALING, target_modules=[], target_parameters=TARGETS)
    return randomize(lib.get_peft_model(base(), config))


def embeddings(batch: int, tokens: int) -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {"inputs_embeds": torch.randn(batch, tokens, WIDTH)}


def infer(model: nn.Module, batch: dict[str, Tensor]) -> None:
    with torch.inference_mode():
        model(**batch, use_cache=False)


def repeat(make: Callable[[], nn.Module], run: Any, shape: tuple[int, int], training: bool) -> Turns:
    model, batch = make().train(training), embeddings(*shape)
    if training:
        batch["inputs_embeds"].requires_grad_()
    call = partial(run, model, batch)
    while True:
        yield call


def bench(what: str, run: Any, shape: tuple[int, int], goal: Goal, training: bool = False) -> Bench:
    def turns(lib: Any) -> Turns:
        return repeat(partial(adapted, lib), run, shape, training)

    return Bench(what, turns, goal, lambda: repeat(base, run, shape, training))


BENCHES = [
    bench("decode, LoRA on 32 experts (floor: the base)", infer, (1, 1), Goal(1.0, 1.5)),
    bench("prefill 128, LoRA on 32 experts", infer, (1, 128), Goal(1.0, 1.5)),
    bench("training step, LoRA on 32 experts", step, (2, 64), Goal(1.0, 1.5), training=True),
]
