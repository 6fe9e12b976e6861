# SPDX-License-Identifier: Apache-2.0
"""The parts of the demo, in order. Each shows what it does and returns what later parts need."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import graft
from examples.demo.data import DemoError
from examples.demo.display import console, progress, waiting
from examples.demo_lm import display, scoring
from examples.demo_lm.chat import prompt
from examples.demo_lm.data import Pair, Task
from examples.demo_lm.methods import LORA, OTHERS, Choice
from examples.demo_lm.model import load
from examples.demo_lm.training import BATCH, generate, train

TOKENS = 32  # at most, of an answer: the base model is allowed to talk
SHOTS = 3


@dataclass
class Run:
    """What the parts share: settings, data, results so far."""

    source: str  # of the base model
    tokenizer: Any
    tasks: list[Task]
    steps: dict[str, int]  # by task
    seed: int
    folder: Path  # of the saved adapters
    results: dict[str, Any] = field(default_factory=dict)  # by task
    methods: dict[str, Any] = field(default_factory=dict)  # results on the dates, by method
    answers: dict[tuple[str, str], list[str]] = field(default_factory=dict)  # by task and who gave them

    def ask(self, model: nn.Module, task: Task, shots: Sequence[Pair] = ()) -> list[str]:
        prompts = [prompt(self.tokenizer, task.instruction, pair.text, shots) for pair in task.test]
        return generate(model, self.tokenizer, prompts, tokens=TOKENS)

    def fit(self, model: nn.Module, task: Task, choice: Choice, name: str) -> dict[str, Any]:
        """Train, behind a progress bar; returns losses and seconds."""
        start, steps = time.perf_counter(), self.steps[task.name]
        losses = train(
            model, self.tokenizer, task, steps=steps, lr=choice.lr, seed=self.seed, after_step=choice.after_step
        )
        return {"losses": progress(losses, name, steps), "seconds": time.perf_counter() - start}


def judge(answers: Sequence[str], task: Task) -> dict[str, float]:
    pairs = list(zip(answers, task.test, strict=True))
    return {
        "exact": scoring.share([scoring.exact(answer, pair.answer) for answer, pair in pairs]),
        "lenient": scoring.share([task.read(answer) == pair.answer for answer, pair in pairs]),
    }


def without_adapters(run: Run, base: nn.Module) -> None:
    console.print(display.tasks_table(run.tasks))
    for task in run.tasks:
        result = run.results[task.name] = {"train": len(task.train), "test": len(task.test), "scores": {}}
        if task.name == "topics":
            truths = [[pair.answer for pair in split] for split in (task.train, task.test)]
            result["scores"]["majority"] = {"exact": scoring.majority(*truths)}
        for who, shots in (("base", 0), (f"base, {SHOTS} examples in the prompt", SHOTS)):
            with waiting(f"{task.name}: the base model answers"):
                answers = run.answers[task.name, who] = run.ask(base, task, task.train[:shots])
            result["scores"][who] = judge(answers, task)


def two_adapters(run: Run, base: nn.Module) -> nn.Module:
    first, second = run.tasks
    torch.manual_seed(run.seed)
    model = graft.get_peft_model(base, LORA.config(run.steps[first.name]), adapter_name=first.name)
    model.add_adapter(second.name, LORA.config(run.steps[second.name]))
    for task in run.tasks:
        result = run.results[task.name]
        model.set_adapter(task.name)
        model.print_trainable_parameters()
        result["parameters"], _ = model.get_nb_trainable_parameters()
        result |= run.fit(model, task, LORA, task.name)
        with waiting(f"{task.name}: the adapter answers"):
            answers = run.answers[task.name, "adapter"] = run.ask(model, task)
        result["scores"]["adapter"] = judge(answers, task)
        result["groups"] = {who: groups(run.answers[task.name, who], task) for who in ("base", "adapter")}
        console.print(display.before_after_table(task.test[:10], run.answers[task.name, "base"][:10], answers[:10]))
        console.print(display.groups_table(task.name, result["groups"]))
    console.print(display.scores_table(run.results))
    model.save_pretrained(run.folder)
    return model


def groups(answers: Sequence[str], task: Task) -> dict[str, float]:
    hits = [scoring.exact(answer, pair.answer) for answer, pair in zip(answers, task.test, strict=True)]
    return scoring.by_group(hits, [pair.group for pair in task.test])


def reloaded(run: Run) -> nn.Module:
    """Both adapters on a fresh base; they must answer as before they were saved."""
    first, second = run.tasks
    model = graft.PeftModel.from_pretrained(load(run.source)[0], run.folder / first.name, adapter_name=first.name)
    model.load_adapter(run.folder / second.name, adapter_name=second.name)
    for task in run.tasks:
        model.set_adapter(task.name)
        run.results[task.name]["bytes"] = size(run.folder / task.name)
        same = count_same(run.ask(model, task), run.answers[task.name, "adapter"])
        console.print(
            f"{run.folder / task.name}: {run.results[task.name]['bytes'] / 1000:.0f} kB; "
            f"{same} of {len(task.test)} answers as before it was saved"
        )
        if same < len(task.test):
            raise DemoError(f"{task.name}: the reloaded adapter answers differently: a defect of graft.")
    dates = run.results[first.name]
    facts = {key: dates[key] for key in ("losses", "seconds", "parameters", "bytes")}
    run.methods["LoRA"] = facts | dates["scores"]["adapter"] | {"note": LORA.note, "lr": LORA.lr}
    return model


def mixed(run: Run, model: nn.Module) -> None:
    """One batch whose rows use one adapter, the other, or none."""
    rows = [(who, task, i) for i in range(3) for task in run.tasks for who in (task.name, "__base__")]
    prompts = [prompt(run.tokenizer, task.instruction, task.test[i].text) for _, task, i in rows]
    names = [who for who, _, _ in rows]
    answers = generate(model, run.tokenizer, prompts, tokens=TOKENS, adapter_names=names)
    console.print(display.mixed_table([(who, task.test[i]) for who, task, i in rows], answers))
    alone = [run.answers[task.name, "base" if who == "__base__" else "adapter"][i] for who, task, i in rows]
    console.print(f"{count_same(answers, alone)} of {len(rows)} answers as in a batch of one adapter")


def other_methods(run: Run, choices: dict[str, Choice] = OTHERS) -> None:
    """The dates by other methods, each on a base of its own; judged by what the saved file answers."""
    task = run.tasks[0]
    for name, choice in choices.items():
        torch.manual_seed(run.seed)
        model = graft.get_peft_model(load(run.source)[0], choice.config(run.steps[task.name]))
        parameters, _ = model.get_nb_trainable_parameters()
        result = run.fit(model, task, choice, name)
        folder = run.folder / name.replace(" ", "-").lower()
        model.save_pretrained(folder)
        with waiting(f"{name}: its answers"):
            answers = run.ask(graft.PeftModel.from_pretrained(load(run.source)[0], folder), task)
        facts = {"parameters": parameters, "bytes": size(folder), "note": choice.note, "lr": choice.lr}
        run.methods[name] = result | judge(answers, task) | facts
    caption = (
        f"The same for all: data, prompts and their order, {run.steps[task.name]} steps of {BATCH} pairs, AdamW with "
        f"warm-up and linear decay, seed {run.seed}, greedy answers from the saved file. Of each method's own: the "
        "learning rate, chosen on validation dates."
    )
    console.print(display.comparison_table(run.methods, len(task.test), caption))


def size(folder: Path) -> int:
    return (folder / "adapter_model.safetensors").stat().st_size


def count_same(a: Sequence[str], b: Sequence[str]) -> int:
    return sum(x == y for x, y in zip(a, b, strict=True))
