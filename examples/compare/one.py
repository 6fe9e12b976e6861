# SPDX-License-Identifier: Apache-2.0
"""One method in a process of its own, so that its peak memory is its own: prints a line of JSON for each event."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import graft
from examples.compare.choices import CHOICES, DTYPE, Choice, calibration
from examples.demo_lm.chat import IGNORED, Batch, prompt, training_batch
from examples.demo_lm.data import Task, dates
from examples.demo_lm.model import load
from examples.demo_lm.story import TOKENS, judge, size
from examples.demo_lm.training import BATCH, batches, generate


def say(**event: Any) -> None:
    print(json.dumps(event), flush=True)


def peak() -> int:
    """Return the process's peak memory so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def compare(name: str, source: str, steps: int, seed: int, held_out: int, rate: float | None = None) -> None:
    """Train a method on the dates, save, load on a fresh base, answer; say its results.

    rate: a learning rate to try; then the questions are the validation dates.
    """
    choice, task = CHOICES[name], dates(seed, held_out)
    if rate is not None:
        choice, task = replace(choice, lr=rate), replace(task, test=task.validation)
    say(result=run(choice, source, task, steps, seed))


def run(choice: Choice, source: str, task: Task, steps: int, seed: int) -> dict[str, Any]:
    base, tokenizer = load(source, DTYPE)
    start = time.perf_counter()
    config, data = choice.made(steps, tokenizer), calibration(tokenizer, task, seed)
    if choice.before is not None:
        choice.before(base, config, data)
    torch.manual_seed(seed)
    model = graft.get_peft_model(base, config)
    if choice.after is not None:
        choice.after(model, data)
    prepared = time.perf_counter() - start
    start, before = time.process_time(), time.perf_counter()
    loss = 0.0
    for i, value in enumerate(train(model, tokenizer, task, choice, steps, seed)):
        loss = value
        say(step=i + 1, loss=value)
    seconds, cpu, memory = time.perf_counter() - before, time.process_time() - start, peak()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        parameters, _ = model.get_nb_trainable_parameters()
        bytes_ = size(Path(folder))
        del model, base
        fresh = graft.PeftModel.from_pretrained(load(source, DTYPE)[0], folder)
        prompts = [prompt(tokenizer, task.instruction, pair.text) for pair in task.test]
        say(step=steps, loss=loss, answering=True)
        answers = generate(fresh, tokenizer, prompts, tokens=TOKENS)
    return {
        **judge(answers, task),
        "loss": loss,
        "seconds": seconds,
        "steps": steps,
        "cpu_seconds": cpu,
        "prepare_seconds": prepared,
        "peak_memory": memory,
        "bytes": bytes_,
        "parameters": parameters,
        "lr": choice.lr,
        "note": choice.note,
    }


def train(model: Any, tokenizer: Any, task: Task, choice: Choice, steps: int, seed: int) -> Any:
    """Train as the demo does, with the method's own part of the loss; yield the loss of each step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=choice.lr, weight_decay=0.0)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup) * (1 - step / steps)
    )
    if choice.after_step is not None:
        choice.after_step(optimizer, model)
    torch.manual_seed(seed)
    model.train()
    for pairs in batches(task.train, BATCH, steps, seed):
        batch = training_batch(tokenizer, task.instruction, pairs)
        loss = model(**(batch if choice.prompt else answers_only(batch))).loss
        total = loss if choice.loss is None else loss + choice.loss(model)
        total.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield loss.item()
    model.eval()


def answers_only(batch: Batch) -> dict[str, Any]:
    """Return a batch whose logits begin before the first answer: those of the prompts are a fifth of a step's time."""
    labels = batch["labels"]
    first = int((labels != IGNORED).any(0).int().argmax()) - 1
    return {**batch, "labels": labels[:, first:], "logits_to_keep": torch.arange(first, labels.shape[1])}


if __name__ == "__main__":
    name, source, steps, seed, held_out, *rate = sys.argv[1:]
    compare(name, source, int(steps), int(seed), int(held_out), *map(float, rate))
