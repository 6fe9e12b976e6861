# SPDX-License-Identifier: Apache-2.0
"""Adapters that train together on a language model end with the bits of training alone: the same model, data, seeds."""

import copy
from dataclasses import dataclass, field
from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import graft
from tests.covering import EVERYTHING
from tests.models import checkpoint, seeded

STEPS, VOCAB = 20 if EVERYTHING else 6, 64
QV = ["q_proj", "v_proj"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama() -> nn.Module:
    return copy.deepcopy(_llama())


@cache
def _llama() -> nn.Module:
    with seeded(0):
        sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
        return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=VOCAB))


def lora(**options):
    return partial(graft.LoraConfig, **{"r": 8, "target_modules": ALL, **options})


@dataclass
class Run:
    """How one adapter trains."""

    config: partial
    rows: int = 1
    length: int = 16
    rate: float = 1e-2
    clip: float | None = None
    accumulate: int = 1
    kind: type = torch.optim.AdamW
    options: dict = field(default_factory=dict)
    scale: float = 1.0  # of its loss

    def batches(self, seed: int) -> list[Tensor]:
        g = torch.Generator().manual_seed(seed)
        return [torch.randint(1, VOCAB, (self.rows, self.length), generator=g) for _ in range(STEPS)]


class Training:
    def __init__(self, model, name: str, run: Run, seed: int):
        self.run, self.seed, self.parameters = run, seed, [p for _, p in model.adapter_parameters(name)]
        self.batches = run.batches(seed)
        self.optimizer = run.kind(self.parameters, run.rate, **run.options)

    def loss(self, logits: Tensor, ids: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), ids[:, 1:].reshape(-1))
        return loss * self.run.scale / self.run.accumulate

    def step(self, t: int) -> None:
        if (t + 1) % self.run.accumulate:
            return
        if self.run.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.run.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


def model_with(runs: dict[str, Run]):
    """A model with these adapters, each with the values that it begins with alone."""
    model = None
    for name, run in runs.items():
        with seeded(sum(map(ord, name))):
            if model is None:
                model = graft.get_peft_model(llama(), run.config(), name, mixed=True)
            else:
                model.add_adapter(name, run.config())
    return model.train()


def alone(name: str, run: Run, checkpointing: bool = False) -> list[Tensor]:
    model = model_with({name: run})
    if checkpointing:
        checkpoint(model.get_base_model())
    training = Training(model, name, run, sum(map(ord, name)))
    with seeded(training.seed):
        for t, ids in enumerate(training.batches):
            training.loss(model(input_ids=ids).logits, ids).backward()
            training.step(t)
    return [p.detach() for p in training.parameters]


def together(runs: dict[str, Run], checkpointing: bool = False, order=None) -> dict[str, list[Tensor]]:
    model = model_with(runs)
    if checkpointing:
        checkpoint(model.get_base_model())
    model.set_requires_grad(list(runs))
    trainings = {name: Training(model, name, run, sum(map(ord, name))) for name, run in runs.items()}
    generators = {name: torch.Generator().manual_seed(t.seed) for name, t in trainings.items()}
    length = max(run.length for run in runs.values())
    names = [name for name, run in runs.items() for _ in range(run.rows)]
    order = torch.arange(len(names)) if order is None else order(len(names))
    back = order.argsort()
    for t in range(STEPS):
        ids = [training.batches[t] for training in trainings.values()]
        # padded on the right, which a causal model does not see
        batch = torch.cat([nn.functional.pad(i, (0, length - i.shape[1])) for i in ids])
        rows = [names[i] for i in order]
        logits = model(input_ids=batch[order], adapter_names=rows, adapter_generators=generators).logits[back]
        parts = logits.split([run.rows for run in runs.values()])
        losses = [tr.loss(part[:, : i.shape[1]], i) for tr, part, i in zip(trainings.values(), parts, ids)]
        sum(losses).backward()
        for training in trainings.values():
            training.step(t)
    return {name: [p.detach() for p in training.parameters] for name, training in trainings.items()}


CASES = {
    "ranks, targets, rates, rows": {
        "u": Run(lora(), rows=1),
        "v": Run(lora(r=4, target_modules=QV, lora_alpha=5), rows=4, rate=3e-2),
        "w": Run(lora(r=2, lora_alpha=3, use_rslora=True), rows=8),
        "x": Run(lora(r=16), rows=6, kind=torch.optim.SGD),
    },
    "one shape": {name: Run(lora()) for name in "uvwx"},
    "one shape, many rows": {name: Run(lora(r=2), rows=6) for name in "uvwx"},
    "dropout": {
        "u": Run(lora(lora_dropout=0.1), rows=5),
        "v": Run(lora(lora_dropout=0.3)),
        "w": Run(lora()),
        "x": Run(lora(lora_dropout=0.5, use_dora=True), rows=5),
    },
    "clipping, accumulation, decay": {
        "u": Run(lora(), clip=0.1),
        "v": Run(lora(lora_dropout=0.2), accumulate=4, options={"weight_decay": 0.1, "fused": True}),
        "w": Run(lora(target_modules=QV), clip=1.0, accumulate=2, rows=5),
    },
    "lengths": {"u": Run(lora(), length=16), "v": Run(lora(r=4), length=32), "w": Run(lora(), length=48)},
    "heads, token rows": {
        "u": Run(lora(modules_to_save=["lm_head"])),
        "v": Run(lora(trainable_token_indices={"embed_tokens": [1, 3, 5]})),
        "w": Run(lora(modules_to_save=["lm_head"], lora_dropout=0.1), rows=4),
    },
    "methods": {
        "u": Run(lora()),
        "v": Run(partial(graft.IA3Config, target_modules=ALL, feedforward_modules=["down_proj"])),
        "w": Run(partial(graft.LoHaConfig, r=2, target_modules=ALL, rank_dropout=0.2), rows=5),
        "x": Run(partial(graft.OFTConfig, r=0, oft_block_size=8, target_modules=ALL, module_dropout=0.2)),
        "y": Run(lora(lora_dropout=0.1)),
    },
}


def equal(runs: dict[str, Run], found: dict[str, list[Tensor]], **options) -> None:
    for name, run in runs.items():
        expected = alone(name, run, **options)
        assert all(map(torch.equal, found[name], expected)), name
        assert all(p.isfinite().all() for p in expected)


@pytest.mark.parametrize("runs", CASES.values(), ids=CASES)
def test_together_is_alone(runs):
    equal(runs, together(runs))


def test_rows_out_of_order():
    runs = CASES["methods"]
    equal(runs, together(runs, order=lambda n: torch.randperm(n, generator=torch.Generator().manual_seed(0))))


def test_under_gradient_checkpointing():
    runs = CASES["dropout"]
    equal(runs, together(runs, checkpointing=True), checkpointing=True)


def test_beside_an_adapter_that_diverges():
    runs = {"u": Run(lora(lora_dropout=0.1)), "v": Run(lora(), rate=1e30, kind=torch.optim.SGD, scale=1e30)}
    runs |= {"w": Run(lora(r=4), rows=4)}
    found = together(runs)
    assert all(p.isnan().all() for p in found.pop("v"))
    del runs["v"]
    equal(runs, found)
