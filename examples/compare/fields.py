# SPDX-License-Identifier: Apache-2.0
"""The tasks with their models on which methods are searched and compared, and the training of one adapter there."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import graft
from examples.compare.choices import CALIBRATION, DTYPE, Choice
from examples.demo.__main__ import load as load_minilm
from examples.demo.data import DemoError, load_task
from examples.demo.sweep import loaders
from examples.demo_lm.chat import training_batch
from examples.demo_lm.data import dates
from examples.demo_lm.model import load as load_smollm
from examples.demo_lm.model import model_source

TOKENS, JUDGED = 32, 112  # of a text that is classified, at most; texts that judge a rate, about
HEAD_LR = 2e-3  # of the classifier, which is no part of the method
MINILM, SMOLLM = "all-MiniLM-L6-v2", "SmolLM2-135M-Instruct in bfloat16"
TARGETS = {  # of a Llama → of a BERT
    "q_proj": "query",
    "v_proj": "value",
}
NOT_IN_BERT = {
    "aLoRA": "the text from which on it acts is a chat's",
    "adaption prompts": "for the attention of Llama, Mistral and GPT-2",
    "MixLoRA": "for gated MLPs",
    "SHADOW": "for causal models",
}


@dataclasses.dataclass
class Field:
    """A task with its model.

    Attributes:
        load: makes a fresh base.
        fit: a method's config → the one for this model.
        optimizer: of the parameters of a run, and lr.
        valid: what rates are judged by.
        batch: samples of a step.
        lacks: methods that have no place here, with the reason.
        test: held-out texts.
    """

    model: str
    model_type: str
    load: Callable[[], nn.Module]
    fit: Callable[[Any], Any]
    optimizer: Callable[..., torch.optim.Optimizer]
    train: DataLoader
    valid: DataLoader
    batch: int
    tokenizer: Any = None
    lacks: dict[str, str] = dataclasses.field(default_factory=dict)
    test: DataLoader | None = None


def minilm(task: str, quick: bool) -> Field:
    """Texts to classify; the classifier trains with each adapter, at a rate of its own."""
    data = load_task(task, limit=240 if quick else None)
    base, encode = load_minilm(None, len(data.labels))

    def begin(texts: list[str]) -> dict[str, torch.Tensor]:
        return {name: value[:, :TOKENS] for name, value in encode(texts).items()}

    train, valid = loaders(data, begin, quick)
    judging: Any = valid.dataset
    rows = judging[:: max(1, round(len(judging) / JUDGED))]
    valid = DataLoader(rows, valid.batch_size, collate_fn=valid.collate_fn)
    texts = sorted(zip(data.test.texts, data.test.labels.tolist()), key=lambda row: len(row[0]))
    test = DataLoader(texts, 32, collate_fn=valid.collate_fn)  # type: ignore[arg-type]

    def load() -> nn.Module:
        torch.manual_seed(0)  # of the classifier's first values
        return load_minilm(None, len(data.labels))[0]

    optimizer = two_groups(len(data.labels), base.config.hidden_size)
    batch = train.batch_size or 0
    return Field(MINILM, "bert", load, for_bert, optimizer, train, valid, batch, lacks=NOT_IN_BERT, test=test)


def two_groups(labels: int, width: int) -> Callable[..., torch.optim.Optimizer]:
    """Return what makes an optimizer of an adapter's parameters at a rate, and of the classifier's at its own."""
    sizes = {(labels, width), (labels,)}

    def make(parameters: Sequence[nn.Parameter], lr: float, head: Sequence[nn.Parameter] = ()) -> torch.optim.Optimizer:
        head = head or [p for p in parameters if tuple(p.shape) in sizes]
        if len(head) != 2:
            raise DemoError(f"A parameter of the adapter is as large as the classifier's, {sizes}: change its rank.")
        rest = [p for p in parameters if not any(p is other for other in head)]
        groups = [{"params": rest, "lr": lr}, {"params": head, "lr": HEAD_LR}]
        return torch.optim.AdamW(groups, weight_decay=0.0)

    return make


def for_bert(config: Any) -> Any:
    """Return a config for a Llama as one for a BERT that classifies."""
    own: dict[str, Any] = {"task_type": "SEQ_CLS"}
    names = getattr(config, "target_modules", None)
    if names is not None:
        own["target_modules"] = [TARGETS[name] for name in names]
    elif isinstance(config, graft.LNTuningConfig):
        own["target_modules"] = ["LayerNorm"]
    return dataclasses.replace(config, **own)


def smollm(task: str, quick: bool) -> Field:
    """Dates in ten languages, to be written in ISO 8601; the base in bfloat16, as most train such models."""
    source = model_source(None)
    tokenizer = load_smollm(source)[1]
    data = dates(0, held_out=16)
    collate = partial(training_batch, tokenizer, data.instruction)
    train = DataLoader(data.train, 2, shuffle=True, collate_fn=collate, drop_last=True)  # type: ignore[arg-type]
    valid = DataLoader(data.validation, 8, collate_fn=collate)  # type: ignore[arg-type]
    optimizer = partial(torch.optim.AdamW, weight_decay=0.0)

    def load() -> nn.Module:
        return load_smollm(source, DTYPE)[0]

    return Field(SMOLLM, "llama", load, lambda config: config, optimizer, train, valid, 2, tokenizer)


FIELDS = {"spam": minilm, "topics": minilm, "dates": smollm}


@dataclasses.dataclass
class Trained:
    """An adapted model after its training.

    Attributes:
        loss: of the last step; NaN: a loss was not finite, and training stopped there.
        cpu_seconds, prepare_seconds: of all steps; before the first.
    """

    model: Any
    loss: float
    cpu_seconds: float
    prepare_seconds: float


def schedule(steps: int, warmup: int = 0) -> Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]:
    """Return what makes a learning rate rise in the first steps, and then fall to a hundredth in so many."""
    fall = partial(torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.01, total_iters=steps - warmup)
    if not warmup:
        return fall
    rise = partial(torch.optim.lr_scheduler.LinearLR, start_factor=0.01, total_iters=warmup)
    return lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
        optimizer, [rise(optimizer), fall(optimizer)], [warmup]
    )


def trained(field: Field, choice: Choice, config: Any, lr: float, steps: int, seed: int, warmup: int = 0) -> Trained:
    """Train an adapter alone, with all that its method needs; the base's modules stay in eval mode, without dropout."""
    base = field.load().eval()
    start = time.perf_counter()
    torch.manual_seed(seed)
    data = [batch for batch, _ in zip(field.train, range(CALIBRATION))] if choice.before or choice.after else []
    if choice.before is not None:
        choice.before(base, config, data)
    own = list(base.modules())
    torch.manual_seed(seed)
    model = graft.get_peft_model(base, config)
    if choice.after is not None:
        choice.after(model, data)
    training = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = [p for name, p in training.items() if "classifier" in name]
    optimizer = field.optimizer([*training.values()], lr=lr, **({"head": head} if head else {}))
    rate = schedule(steps, warmup)(optimizer)
    if choice.after_step is not None:
        choice.after_step(optimizer, model)
    prepared = time.perf_counter() - start
    model.train()
    for module in own:
        module.training = False
    start, loss = time.process_time(), math.nan
    for batch, _ in zip(endless(field.train), range(steps)):
        value = model(**batch).loss
        loss = value.item()
        if not math.isfinite(loss):
            break
        (value if choice.loss is None else value + choice.loss(model)).backward()
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
    model.eval()
    return Trained(model, loss, time.process_time() - start, prepared)


def endless(data: DataLoader) -> Iterator[dict[str, torch.Tensor]]:
    while True:
        yield from data


@torch.no_grad()
def mean_loss(model: Any, data: DataLoader) -> float:
    return float(torch.stack([model(**batch).loss for batch in data]).mean())
