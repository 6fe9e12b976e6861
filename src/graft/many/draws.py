# SPDX-License-Identifier: Apache-2.0
"""The random numbers of one run: a generator of its own, and its own state of those that its loader holds.

What a run draws stands in the global generator's place meanwhile, so that a loader, an initialisation or a loss draws
what it would draw in a program of its own that began with `torch.manual_seed(seed)`.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from graft.core.random import LOCK
from graft.train.state_file import find_generators

States = list[Tensor]


class Draws:
    """Within the block, the global generator and those of the loader are in this run's states. Other threads wait.

    Attributes:
        own: the run's generator, in the global one's place.
    """

    def __init__(self, seed: int, data: object = None):
        self.generator = Generator(device="cpu").manual_seed(seed)
        self.loader_generators = find_generators(data)
        self.loader_states = [g.get_state() for g in self.loader_generators]
        self._saved: list[States] = []

    @property
    def states(self) -> States:
        return [self.generator.get_state(), *self.loader_states]

    @states.setter
    def states(self, states: States) -> None:
        self.generator.set_state(states[0])
        self.loader_states = states[1:]

    def __enter__(self) -> None:
        LOCK.acquire()
        self._saved.append([torch.get_rng_state(), *(g.get_state() for g in self.loader_generators)])
        torch.set_rng_state(self.generator.get_state())
        for generator, state in zip(self.loader_generators, self.loader_states):
            generator.set_state(state)

    def __exit__(self, *_: object) -> None:
        self.states = [torch.get_rng_state(), *(g.get_state() for g in self.loader_generators)]
        before = self._saved.pop()
        torch.set_rng_state(before[0])
        for generator, state in zip(self.loader_generators, before[1:]):
            generator.set_state(state)
        LOCK.release()
