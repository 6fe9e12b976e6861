# SPDX-License-Identifier: Apache-2.0
"""A plain training loop, and prediction. Nothing here knows that the model carries adapters."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from examples.demo.data import Split

Encode = Callable[[list[str]], dict[str, Tensor]]  # texts -> input_ids, attention_mask … (batch, tokens)


def batches(split: Split, size: int, steps: int, seed: int) -> Iterator[tuple[list[str], Tensor]]:
    """`steps` random batches; within an epoch no text comes twice."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, len(split))
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(len(split), generator=generator)
        picked, order = order[:size], order[size:]
        yield [split.texts[i] for i in picked.tolist()], split.labels[picked]


def train(
    model: nn.Module, encode: Encode, split: Split, *, steps: int, batch_size: int, lr: float, seed: int
) -> Iterator[float]:
    """AdamW with linear decay on whatever requires a gradient; yields the loss of each step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    torch.manual_seed(seed)  # dropout
    model.train()
    for texts, labels in batches(split, batch_size, steps, seed):
        loss = model(**encode(texts), labels=labels).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield loss.item()


def logits(output: Any, batch: dict[str, Tensor]) -> Tensor:
    return output.logits


@torch.no_grad()
def predict(
    model: nn.Module, encode: Encode, texts: list[str], read: Callable[..., Tensor] = logits, batch_size: int = 64
) -> Tensor:
    """What `read(output, batch)` gives for each text, in evaluation mode: (n, …)."""
    model.eval()
    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # similar lengths together: little padding
    parts = []
    for start in range(0, len(texts), batch_size):
        batch = encode([texts[i] for i in by_length[start : start + batch_size]])
        parts.append(read(model(**batch), batch))
    return torch.cat(parts)[torch.tensor(by_length).argsort()]


def accuracy(scores: Tensor, labels: Tensor) -> float:
    return (scores.argmax(-1) == labels).float().mean().item()
