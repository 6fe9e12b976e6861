# SPDX-License-Identifier: Apache-2.0
"""A plain training loop and greedy generation. Nothing here knows which method the model carries."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from examples.demo_lm.chat import generation_batch, training_batch
from examples.demo_lm.data import Pair, Task

BATCH = 8


def batches(pairs: Sequence[Pair], size: int, steps: int, seed: int) -> Iterator[list[Pair]]:
    """`steps` random batches; within an epoch no pair comes twice."""
    draw, order = random.Random(seed), []
    for _ in range(steps):
        if len(order) < size:
            order = draw.sample(range(len(pairs)), len(pairs))
        picked, order = order[:size], order[size:]
        yield [pairs[i] for i in picked]


def train(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    *,
    steps: int,
    lr: float,
    seed: int,
    after_step: Callable[[torch.optim.Optimizer, nn.Module], Any] | None = None,
) -> Iterator[float]:
    """AdamW, warmed up over a tenth of the steps and then decayed linearly to 0; yields the loss of each step.

    Args:
        after_step: given the optimizer and the model, registers what is to happen after each step.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup) * (1 - step / steps)
    )
    if after_step is not None:
        after_step(optimizer, model)
    torch.manual_seed(seed)  # dropout, if a method has any
    model.train()
    for pairs in batches(task.train, BATCH, steps, seed):
        loss = model(**training_batch(tokenizer, task.instruction, pairs)).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield loss.item()
    model.eval()


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    tokens: int,
    adapter_names: Sequence[str] | None = None,
    size: int = 50,
) -> list[str]:
    """The model's greedy answers, of at most `tokens` tokens.

    Args:
        adapter_names: the adapter of each prompt, for a batch of several.
        size: prompts at a time.
    """
    model.eval()
    answers = []
    for start in range(0, len(prompts), size):
        batch = generation_batch(tokenizer, prompts[start : start + size])
        rows = {} if adapter_names is None else {"adapter_names": list(adapter_names[start : start + size])}
        output = model.generate(**batch, **rows, max_new_tokens=tokens, do_sample=False)
        answers += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers
