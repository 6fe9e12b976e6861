# SPDX-License-Identifier: Apache-2.0
"""aLoRA, which acts from its invocation tokens on, and X-LoRA, which weighs experts. The floor: the base alone."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import graft
from benchmarks.measure import Bench, Goal, Turns
from benchmarks.models import LINEAR, SCALING, WIDTH, randomize, smollm

LAYERS, BATCH, TOKENS, INVOCATION = 2, 4, 128, [7, 8, 9]


def base() -> nn.Module:
    """The blocks of the other rows, with a head."""
    blocks = smollm(LAYERS)
    blocks.config.use_cache = False
    with torch.device("meta"):
        model = LlamaForCausalLM(blocks.config)
    model.model = blocks
    torch.manual_seed(0)
    model.lm_head = nn.Linear(WIDTH, blocks.config.vocab_size, bias=False)
    return model.requires_grad_(False)


def ids() -> Tensor:
    torch.manual_seed(2)
    made = torch.randint(16, 1024, (BATCH, TOKENS))
    made[:, TOKENS // 2 : TOKENS // 2 + 3] = torch.tensor(INVOCATION)
    return made


def config(lib: Any, **options: Any) -> Any:
    return lib.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=SCALING * 16, target_modules=list(LINEAR), **options)


def alora(lib: Any) -> nn.Module:
    return randomize(lib.get_peft_model(base(), config(lib, alora_invocation_tokens=INVOCATION)))


@cache
def experts() -> dict[str, str]:
    """Four LoRA experts on disk."""
    folder = tempfile.mkdtemp()
    for i in range(4):
        model = randomize(graft.get_peft_model(base(), config(graft)))
        model.save_pretrained(os.path.join(folder, str(i)))
    return {str(i): os.path.join(folder, str(i)) for i in range(4)}


def xlora(lib: Any) -> nn.Module:
    made = lib.XLoraConfig(task_type="CAUSAL_LM", hidden_size=WIDTH, adapters=experts())
    torch.manual_seed(1)
    return lib.get_peft_model(base(), made)  # type: ignore[no-any-return]


def infer(model: nn.Module, batch: dict[str, Tensor]) -> None:
    with torch.no_grad():
        model(**batch)


def train(model: nn.Module, batch: dict[str, Tensor]) -> None:
    for p in model.parameters():
        p.grad = None
    model(**batch, labels=batch["input_ids"]).loss.backward()


def plain(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """The base, with the gradient of its embeddings, as the adapters of the first layer need it."""
    x = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()  # type: ignore[operator]
    model(inputs_embeds=x, labels=batch["input_ids"]).loss.backward()


def repeat(make: Callable[[], nn.Module], run: Any, training: bool) -> Turns:
    model, batch = make().train(training), {"input_ids": ids()}
    call = partial(run, model, batch)
    while True:
        yield call


def bench(what: str, make: Any, training: bool, goal: Goal) -> Bench:
    def turns(lib: Any) -> Turns:
        return repeat(partial(make, lib), train if training else infer, training)

    return Bench(what, turns, goal, lambda: repeat(base, plain if training else infer, training), long=True)


BENCHES = [
    bench("forward, aLoRA r 16 (floor: the base)", alora, False, Goal(1.0)),
    bench("training step, aLoRA r 16", alora, True, Goal(1.0)),
    bench("forward, X-LoRA, 4 experts", xlora, False, Goal(1.0)),
    bench("training step, X-LoRA, 4 experts", xlora, True, Goal(1.0)),
]
