# SPDX-License-Identifier: Apache-2.0
"""The law of isolation: adapters that train together, each on its rows of one batch, end with the bits that each has
when it trains by itself; whatever they draw, and however many rows the others have."""

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.conformance.samples import ADAPTERS, CALLED_CELLS, CELLS, Net, features
from tests.covering import EVERYTHING, law
from tests.models import seeded

STEPS = 20 if EVERYTHING else 3
ROWS = {"default": 5, "other": 20}  # with the second, kernels take over that do not pay for the first
RATES = {"default": 1e-2, "other": 3e-2}


class Fan(Net):
    """One layer before three that get the same input, so that gradients of several modules meet in one sum."""

    def __init__(self, net: Net):
        super().__init__(net.layer, net.ids)
        self.others = nn.ModuleList(Net(copy.deepcopy(net.layer), net.ids) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        if self.ids:
            return sum(net(x) for net in self.others) + super().forward(x)
        s = super().forward(x).flatten(1).tanh().mean(1).view(-1, *[1] * (x.dim() - 1))
        x = x * (1 + s)
        return sum(net.layer(x) for net in self.others) * self.after


def fan_of(cell):
    return Fan(cell.base()).eval()


def batches(cell, name: str) -> list[Tensor]:
    with seeded(ord(name[0])):
        every = cell.inputs(STEPS * ROWS[name])
        return list(every[torch.randperm(len(every))].split(ROWS[name]))


class Training:
    """One adapter's optimizer and the seed of what it draws."""

    def __init__(self, model, name: str):
        self.model, self.name, self.seed = model, name, sum(map(ord, name))
        self.parameters = [p for _, p in model.adapter_parameters(name)]
        self.optimizer = torch.optim.AdamW(self.parameters, RATES[name])

    def loss(self, y: Tensor) -> Tensor:
        return (y - 1).square().mean()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters]


def alone(cell, model, name: str) -> list[Tensor]:
    model.set_adapter(name)
    training = Training(model, name)
    with seeded(training.seed):
        for x in batches(cell, name):
            training.loss(model(x)).backward()
            training.step()
    return training.values()


def together(cell, model, names) -> dict[str, list[Tensor]]:
    model.set_requires_grad(names)
    trainings = [Training(model, name) for name in names]
    rows = [name for name in names for _ in range(ROWS[name])]
    generators = {t.name: torch.Generator().manual_seed(t.seed) for t in trainings}
    sizes = [ROWS[name] for name in names]
    for parts in zip(*(batches(cell, name) for name in names)):
        y = model(torch.cat(parts), adapter_names=rows, adapter_generators=generators)
        sum(t.loss(part) for t, part in zip(trainings, y.split(sizes))).backward()
        for training in trainings:
            training.step()
    return {t.name: t.values() for t in trainings}


def every_sample(cell) -> list[tuple]:
    """What this law meets: each sample on the layer where most have a way of their own, with another order of sums."""
    return [*features(cell), *[("sample", str(cell.sample))] * (cell.layer.name == "linear")]


@pytest.mark.filterwarnings("ignore:AdaLoRA adapter")
@law("cell", [c for c in (*CELLS, *CALLED_CELLS) if c.store.name == "dense"], every_sample)
def test_together_is_alone(cell):
    model = cell.fresh(ADAPTERS, fan_of(cell)).train()
    apart = {name: alone(cell, copy.deepcopy(model), name) for name in ADAPTERS}
    started = {name: [p.detach().clone() for _, p in model.adapter_parameters(name)] for name in ADAPTERS}
    both = together(cell, model, ADAPTERS)
    for name in ADAPTERS:
        assert not all(map(torch.equal, started[name], apart[name])), "it has trained"
        assert all(map(torch.equal, both[name], apart[name])), name
