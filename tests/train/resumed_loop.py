# SPDX-License-Identifier: Apache-2.0
"""A small training in a loop of one's own. As a program it saves after each step and is killed at some moment:
`python -m tests.train.resumed_loop FOLDER SYNCS`."""

import os
import signal
import sys
from functools import partial

import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, SequentialLR

import graft
from graft.config import atomic

CASES = {
    "adamw": (partial(AdamW, lr=1e-2), partial(CosineAnnealingLR, T_max=9)),
    "amsgrad": (partial(AdamW, lr=1e-2, amsgrad=True, foreach=False), None),
    "sgd": (partial(SGD, lr=0.1, momentum=0.9, nesterov=True), partial(LambdaLR, lr_lambda=lambda n: 1 / (n + 1))),
    "sequential": (
        partial(AdamW, lr=1e-2),
        lambda o: SequentialLR(o, [LambdaLR(o, lambda n: n / 3), CosineAnnealingLR(o, 9)], [3]),
    ),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.second(self.first(x).tanh()).tanh())


def config(**options):
    options = dict(target_modules=["first", "second"], r=4, lora_dropout=0.3, modules_to_save=["head"]) | options
    return graft.LoraConfig(**options)


class Training:
    """A model with its optimizer and scheduler, made anew in the same way each time."""

    def __init__(self, case="adamw", seed=1, base_seed=0, **options):
        torch.manual_seed(base_seed)
        base = Net()
        torch.manual_seed(seed)
        self.model = graft.get_peft_model(base, config(**options)).train()
        optimizer, scheduler = CASES[case]
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        slow = [p for n, p in named if "lora_A" in n]
        self.optimizer = optimizer(
            [{"params": slow, "weight_decay": 0.1}, {"params": [p for n, p in named if "lora_A" not in n], "lr": 3e-3}]
        )
        self.scheduler = scheduler and scheduler(self.optimizer)
        self.losses = []

    @property
    def parts(self):
        return self.model, self.optimizer, self.scheduler

    def run(self, steps):
        for _ in range(steps):
            x = torch.randn(5, 8)
            loss = nn.functional.cross_entropy(self.model(x), torch.randint(3, (5,)))
            loss.backward()
            self.optimizer.step()
            self.scheduler and self.scheduler.step()
            self.optimizer.zero_grad()
            self.losses.append(loss.item())
        return self

    def values(self):
        return {n: p.detach().clone() for n, p in self.model.named_parameters()}


def main(folder, syncs):
    training, sync = Training(), atomic.sync_file
    left = [syncs]

    def kill(path):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(path)

    atomic.sync_file = kill
    for step in range(1, 4):
        training.run(1)
        graft.save_training(folder, *training.parts, step=step)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]))
