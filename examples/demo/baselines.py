# SPDX-License-Identifier: Apache-2.0
"""What can be had without adapters: the majority class, and linear probes on the frozen encoder."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.demo.data import Task
from examples.demo.training import Encode, accuracy, predict


def baselines(encoder: nn.Module, encode: Encode, task: Task) -> dict[str, float]:
    """Held-out accuracies. The pooler is what the classification head reads, the mean is the sentence embedding."""
    splits = (task.train, task.test)
    train, test = (predict(encoder, encode, split.texts, features).unbind(1) for split in splits)
    result = {"majority": (task.test.labels == task.train.labels.mode().values).float().mean().item()}
    for name, x, held_out in zip(("linear probe, pooler", "linear probe, mean"), train, test, strict=True):
        head = fit_probe(x, task.train.labels, len(task.labels))
        result[name] = accuracy(head(held_out), task.test.labels)
    return result


def features(output: Any, batch: dict[str, Tensor]) -> Tensor:
    """The pooler's output and the mean of the token states: (batch, 2, hidden), each of length 1."""
    mask = batch["attention_mask"].unsqueeze(-1)  # (batch, tokens, 1)
    mean = (output.last_hidden_state * mask).sum(1) / mask.sum(1)
    return F.normalize(torch.stack([output.pooler_output, mean], dim=1), dim=-1)


def fit_probe(x: Tensor, labels: Tensor, classes: int) -> nn.Linear:
    """Multinomial logistic regression, to convergence; the penalty ‖W‖² / 2n is what C = 1 means elsewhere."""
    head = nn.Linear(x.shape[1], classes)
    nn.init.zeros_(head.weight)
    solver = torch.optim.LBFGS(head.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(head(x), labels) + head.weight.square().sum() / (2 * len(x))
        loss.backward()
        return loss

    solver.step(objective)
    return head
