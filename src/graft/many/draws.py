# SPDX-License-Identifier: Apache-2.0
"""The random numbers of one run: a generator for the run, and its states of the generators in its loader.

Within a block the run's states replace those of the global generator and the loader's. So a loader, an initialisation
or a loss draws the numbers of a separate program that began with `torch.manual_seed(seed)`.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from graft.core.random import LOCK
from graft.train.state_file import find_generators

States = list[Tensor]


class Draws:
    """The random states of one run.

    Within `with draws:` the global CPU generator and the loader's have these states.

    Entering takes the global lock of random numbers, and waits for other threads. Leaving notes the new states,
    restores those from before and releases the lock.

    Attributes:
        generator: the run's, in place of the global one.
        loader_generators, loader_states: generators in the loader and its samplers, and the run's state of each.
    """

    def __init__(self, seed: int, data: object = None):
        """Seed the run's generator, and note the states of the generators that `data` and its samplers hold."""
        self.generator = Generator(device="cpu").manual_seed(seed)
        self.loader_generators = find_generators(data)
        self.loader_states = [g.get_state() for g in self.loader_generators]
        self._saved: list[States] = []

    @property
    def states(self) -> States:
        """The state of the run's generator, then the noted ones of the loader's generators, which may have
        moved since.
        """
        return [self.generator.get_state(), *self.loader_states]

    @states.setter
    def states(self, states: States) -> None:
        """Write the first state into `generator`, and note the others in `loader_states` for the next block."""
        self.generator.set_state(states[0])
        self.loader_states = states[1:]

    def __enter__(self) -> None:
        """Take the lock, save the current global states on a stack, and put this run's states in place."""
        LOCK.acquire()
        self._saved.append([torch.get_rng_state(), *(g.get_state() for g in self.loader_generators)])
        torch.set_rng_state(self.generator.get_state())
        for generator, state in zip(self.loader_generators, self.loader_states):
            generator.set_state(state)

    def __exit__(self, *_: object) -> None:
        """Note the states that the block has left, restore the saved ones, and release the lock."""
        self.states = [torch.get_rng_state(), *(g.get_state() for g in self.loader_generators)]
        before = self._saved.pop()
        torch.set_rng_state(before[0])
        for generator, state in zip(self.loader_generators, before[1:]):
            generator.set_state(state)
        LOCK.release()
