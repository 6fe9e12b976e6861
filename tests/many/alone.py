# SPDX-License-Identifier: Apache-2.0
"""The oracle of these tests: a run in a program of its own, in plain torch, with one adapter on a fresh base."""

from __future__ import annotations

import copy
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

import graft
from graft.many import MultiTrain
from tests import models

llama = models.transformer(  # widths of whole vectors of the CPU: the last numbers of other batches round otherwise
    "LlamaConfig", "LlamaForCausalLM", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=models.STD, vocab_size=models.VOCAB,
    bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip


def tiny():
    """The same tiny language model each time."""
    return models.clone(_tiny(), {})


@cache
def _tiny():
    with models.seeded(0):
        return llama().eval()


class Spec(NamedTuple):
    """What a run is told."""

    config: Any
    lr: float = 1e-2
    seed: int = 0
    accumulate: int = 1
    clip: float | None = None
    tokens: int = 7
    batch: int = 4
    schedule: Any = None
    padding: int = 0

    @property
    def optimizer(self):
        return partial(AdamW, lr=self.lr)

    def data(self) -> DataLoader:
        return DataLoader(rows(self.seed, self.tokens, padding=self.padding), self.batch, shuffle=True)

    def options(self, steps: int) -> dict[str, Any]:
        names = ("optimizer", "schedule", "seed", "accumulate", "clip")
        return {"data": self.data(), "steps": steps, **{name: getattr(self, name) for name in names}}


def rows(seed: int, tokens: int = 7, n: int = 22, padding: int = 0) -> list[dict[str, torch.Tensor]]:
    """Samples of random tokens, all with as much padding; 22: the last batch of four of an epoch is smaller."""
    with models.seeded(100 + seed):
        ids = torch.randint(3, models.VOCAB, (n, tokens))
    if not padding:
        return [{"input_ids": row, "labels": row} for row in ids]
    mask = (torch.arange(tokens) < tokens - padding).long()
    return [
        {"input_ids": row * mask, "attention_mask": mask, "labels": torch.where(mask > 0, row, -100)} for row in ids
    ]


def lora(**options: Any) -> Any:
    return graft.LoraConfig(target_modules=options.pop("target_modules", ["q_proj", "v_proj"]), **options)


def started(names: Any, steps: int, base: Any = None, **options: Any) -> MultiTrain:
    """Runs of these `SPECS`, to make so many steps; none has begun."""
    runs = MultiTrain(base or tiny(), **options)
    for name in names:
        runs.add(name, SPECS[name].config, **SPECS[name].options(steps))
    return runs


def one_run(config: Any = None, base: Any = None, **options: Any) -> MultiTrain:
    """Runs of which there is one, "x"."""
    runs = MultiTrain(base or tiny())
    runs.add("x", config or lora(), **options)
    return runs


def train(model: Any, data: Any, optimizer: Any) -> list[torch.Tensor]:
    """Train a model in plain torch, a step for each batch; return the parameters that train."""
    parameters = [p for p in model.train().parameters() if p.requires_grad]
    stepper = optimizer(parameters)
    for batch in data:
        model(**batch).loss.backward()
        stepper.step()
        stepper.zero_grad()
    return parameters


def alone(spec: Spec, steps: int):
    """Train one adapter; return (its parameters, its losses)."""
    model, loader = tiny(), spec.data()
    with models.seeded(spec.seed):
        model = graft.get_peft_model(model, copy.deepcopy(spec.config)).train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = spec.optimizer(parameters)
        schedule = spec.schedule(optimizer) if spec.schedule else None
        losses, batches = [], iter(())
        for _ in range(steps):
            total = 0.0
            for _ in range(spec.accumulate):
                batch = next(batches, None)
                if batch is None:
                    batches = iter(loader)
                    batch = next(batches)
                loss = model(**batch).loss / spec.accumulate
                loss.backward()
                total += loss.item()
            if spec.clip:
                torch.nn.utils.clip_grad_norm_(parameters, spec.clip)
            optimizer.step()
            if schedule:
                schedule.step()
            optimizer.zero_grad()
            losses.append(total)
    return parameters, losses


BITS = find_spec("graft.kernels.segments") is not None  # rows of a mixed batch get the bits of one adapter's batch


def as_alone(found: Any, wanted: Any) -> bool:
    """Return True if two lists of tensors, of a run together and alone, are the same; close, without `BITS`."""
    close = [torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(found, wanted)]
    return same(found, wanted) if BITS else len(found) == len(wanted) > 0 and all(close)


def same(found: Any, wanted: Any) -> bool:
    """Return True if two lists of tensors have the same bits."""
    return len(found) == len(wanted) > 0 and all(torch.equal(a, b) for a, b in zip(found, wanted))


def batches(n: int = 8, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Batches of four rows each, in a list."""
    found = rows(seed, n=4 * n)
    return [{k: torch.stack([row[k] for row in found[i : i + 4]]) for k in found[0]} for i in range(0, 4 * n, 4)]


SPECS = {
    "plain": Spec(lora(r=4), seed=1),
    "wide": Spec(lora(r=8, lora_alpha=20, target_modules=["q_proj", "down_proj"]), 3e-3, seed=2, clip=0.5),
    "long": Spec(lora(r=2), seed=3, tokens=12),
    "masked": Spec(lora(r=4), seed=6, tokens=12, padding=5),
    "too": Spec(lora(r=4, lora_dropout=0.2), seed=7, tokens=12, padding=2),
    "drops": Spec(lora(r=4, lora_dropout=0.3), seed=8),
    "gathers": Spec(lora(r=4), seed=4, accumulate=3, clip=1.0),
    "timed": Spec(lora(r=4, lora_dropout=0.2), seed=5, schedule=partial(CosineAnnealingLR, T_max=12)),
}
