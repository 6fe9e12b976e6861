# SPDX-License-Identifier: Apache-2.0
"""The generators from which adapters draw in a call that is given one for each, so that what an adapter draws, its
dropout first of all, does not depend on the others in the batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import RLock

import torch
from torch import Generator, Tensor

from graft.core.random import accelerator
from graft.kernels.low_rank import new_seed

LOCK = RLock()  # torch's own generator is one for all threads
_tickets = [0]  # drawn so far, by all threads


class Draws:
    """The generators of a call, by adapter.

    While an adapter's rows run, its generator stands in the place of torch's own: methods draw as they do alone. Each
    run of a layer draws a ticket from torch's own. Gradient checkpointing restores that one before it runs a layer
    again, which so gets the same ticket, and by that the draws of the first time.
    """

    def __init__(self, generators: Mapping[str, Generator]) -> None:
        self.generators = generators
        self._first = {name: g.get_state() for name, g in generators.items()}
        self._began: dict[tuple[int, str], Tensor] = {}  # states with which adapters began, by ticket

    def ticket(self) -> int:
        """Draw the number of a run of a layer."""
        with LOCK:
            _tickets[0] += 1
            return new_seed()

    @contextmanager
    def of(self, adapter: str | None, ticket: int, device: torch.device) -> Iterator[None]:
        """Have all that is drawn within the block come from the adapter's generator; on an accelerator, from a seed
        that comes from it."""
        if adapter is None:
            yield
            return
        generator, own = self.generators[adapter], torch.default_generator
        began = self._began.get((ticket, adapter))
        with LOCK:
            before = own.get_state()
            start = generator.get_state() if began is None else began
            own.set_state(start)
            there = None if device.type == "cpu" or accelerator() is None else torch.get_device_module(device)
            if there is not None:
                elsewhere = there.get_rng_state(device)
                there.manual_seed(new_seed())
            try:
                yield
            finally:
                if began is None:
                    generator.set_state(own.get_state())
                    self._began[ticket, adapter] = start
                own.set_state(before)
                if there is not None:
                    there.set_rng_state(elsewhere, device)

    def take_back(self) -> None:
        """Put the generators back to where they were when the call began."""
        for name, state in self._first.items():
            self.generators[name].set_state(state)


class Untouched:
    """A look at torch's own generators: whether anything but tickets has been drawn from them since."""

    def __init__(self) -> None:
        with LOCK:
            self._cpu, self._tickets, self._device = torch.default_generator.get_state(), _tickets[0], _device_state()

    def still(self) -> bool:
        with LOCK:
            twin = Generator("cpu")
            twin.set_state(self._cpu)
            for _ in range(_tickets[0] - self._tickets):
                new_seed(twin)
            if not torch.equal(twin.get_state(), torch.default_generator.get_state()):
                return False
        now = _device_state()
        return now is None or self._device is None or torch.equal(now, self._device)


def _device_state() -> Tensor | None:
    device = accelerator()
    return None if device is None else torch.get_device_module(device).get_rng_state()
