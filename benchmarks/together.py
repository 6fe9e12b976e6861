# SPDX-License-Identifier: Apache-2.0
"""A step of many adapters together, `MultiTrain`'s whole; PEFT makes the same steps one after another.

The floor: the frozen base on all rows in one batch, with gradients of its input, without adapters and optimizers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import graft
from benchmarks.measure import Bench, Goal, Turns
from benchmarks.models import LINEAR, WIDTH, lora

RANK = 8
optimizer = partial(AdamW, lr=1e-3, fused=True)


def llama(width: int, inner: int, layers: int, heads: int, groups: int) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=groups,
        )
    )


def minilm() -> nn.Module:
    """The shapes of all-MiniLM-L6, with a small vocabulary."""
    config = BertConfig(
        vocab_size=256,
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=12,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


@dataclass(frozen=True)
class Kind:
    """A base, and what adapts it."""

    name: str
    make: Callable[[], nn.Module]
    targets: tuple[str, ...]
    tokens: bool = True  # its labels are tokens; else one a row
    layers: tuple[int, ...] | None = None  # the blocks that are adapted; None: all

    def base(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make().train()

    def batch(self, seed: int, rows: int, tokens: int) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, 256, (rows, tokens), generator=g)
        return {"input_ids": ids, "labels": ids if self.tokens else ids[:, 0] % 2}

    def config(self, lib: Any) -> Any:
        return lora(lib, RANK, self.targets, layers_to_transform=self.layers and list(self.layers))

    def together(self, adapters: int, rows: int, tokens: int) -> Callable[[], Any]:
        runs = graft.MultiTrain(self.base())
        for i in range(adapters):
            data = [self.batch(0 if self.layers else i, rows, tokens)]  # blocks below the adapted ones share a batch
            runs.add(f"a{i}", self.config(graft), data=data, optimizer=optimizer, seed=i, steps=10**9)
        return runs.step

    def one_by_one(self, lib: Any, adapters: int, rows: int, tokens: int) -> Callable[[], None]:
        """Steps of one adapter, as many as there are adapters: what the loops of N runs take together."""
        model = lib.get_peft_model(self.base(), self.config(lib)).train()
        made, batch = optimizer([p for p in model.parameters() if p.requires_grad]), self.batch(0, rows, tokens)

        def run() -> None:
            for _ in range(adapters):
                model(**batch).loss.backward()
                made.step()
                made.zero_grad()

        return run

    def alone(self, rows: int, tokens: int) -> Callable[[], None]:
        model, batch = self.base().requires_grad_(False), self.batch(0, rows, tokens)
        embed: Any = model.get_input_embeddings()  # type: ignore[operator]
        x = embed(batch.pop("input_ids")).detach().requires_grad_()

        def run() -> None:
            x.grad = None
            model(inputs_embeds=x, **batch).loss.backward()

        return run

    def bench(self, adapters: int, rows: int, tokens: int, goal: Goal, long: bool = False, floor: bool = True) -> Bench:
        def turns(lib: Any) -> Turns:
            sizes = adapters, rows, tokens
            call = self.together(*sizes) if lib is graft else self.one_by_one(lib, *sizes)
            while True:
                yield call

        def frozen() -> Turns:
            call = self.alone(adapters * rows, tokens)
            while True:
                yield call

        what = f"{self.name}, {adapters} adapters, {rows} × {tokens} tokens each: a step together"
        return Bench(what, turns, goal, frozen if floor else None, long=long)


TINY = Kind("Llama 4 × 128", partial(llama, 128, 384, 4, 4, 4), LINEAR)
TOP = Kind("Llama 12 × 128, top 2", partial(llama, 128, 384, 12, 4, 4), LINEAR, layers=(10, 11))
MINILM = Kind("MiniLM", minilm, ("query", "value"), tokens=False)
SMOL = Kind("SmolLM2", partial(llama, WIDTH, 1536, 30, 9, 3), ("q_proj", "v_proj"))

# over the floor: 6 r (in + out) beside 4 in · out operations of each adapted layer, in narrow products, two Python
# functions for it, and the optimizers. PEFT / graft: what batching leaves to gain, above that floor
BENCHES = [
    TINY.bench(16, 1, 8, Goal(8, 1.5)),
    TINY.bench(16, 1, 16, Goal(5.8, 1.5)),
    TINY.bench(16, 4, 16, Goal(2.4, 1.5)),
    TOP.bench(16, 8, 32, Goal(2.3), floor=False),
    TINY.bench(64, 1, 16, Goal(8, 1.5), long=True),
    MINILM.bench(16, 1, 16, Goal(2.8, 1.1), long=True),
    SMOL.bench(16, 1, 16, Goal(2.5, 1.15), long=True),
]
