# SPDX-License-Identifier: Apache-2.0
"""An optimizer that sees one Parameter for each of its groups, the slice of a bank's row, in place of many.

What optimizers compute number by number is the same to the bit. Files do not show it: they hold state by tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from graft.many.bank import Row, ends_at_line, places_of

ELEMENTWISE = frozenset(
    {
        optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.Adamax, optim.Adagrad, optim.Adadelta,
        optim.RMSprop, optim.Rprop, optim.ASGD,
    }
)  # fmt: skip

State = dict[str, Any]


def in_order(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Return parameters group by group, and then those that the optimizer does not have."""
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    own, ids = {id(p) for p in parameters}, {id(p) for p in grouped}
    return [*(p for p in grouped if id(p) in own), *(p for p in parameters if id(p) not in ids)]


def may_flatten(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> bool:
    """Return True if an optimizer of these parameters computes number by number, and nobody watches its steps."""
    if type(optimizer) not in ELEMENTWISE or watched(optimizer):
        return False
    own = {id(p) for p in parameters}
    for group in optimizer.param_groups:
        whole = not group.get("fused")  # that kernel rounds otherwise where a tensor ends within a vector of the CPU
        if not all(id(p) in own and p.dim() and (whole or ends_at_line(p)) for p in group["params"]):
            return False
    return True


def watched(optimizer: Optimizer) -> bool:
    """Return True if somebody has hooks on an optimizer's steps."""
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


class Flat:
    """The vectors that stand in an optimizer for its parameters."""

    def __init__(self, optimizer: Optimizer, row: Row):
        self.optimizer = optimizer
        self.parameters: list[list[nn.Parameter]] = [list(group["params"]) for group in optimizer.param_groups]
        self.sizes = [places_of(own)[1] for own in self.parameters]
        assert row.value is not None
        self.vectors = [nn.Parameter(row.value.new_empty(0)) for _ in self.parameters]
        self.attach(row)
        state: dict[nn.Parameter, State] = {}
        for own, vector in zip(self.parameters, self.vectors):
            state[vector] = joined([optimizer.state.get(p, {}) for p in own], own, vector)
        self._put(defaultdict(dict, {v: s for v, s in state.items() if s}), [[v] for v in self.vectors])

    @classmethod
    def of(cls, optimizer: Optimizer, row: Row) -> Flat | None:
        """Return these for an optimizer, which has them from now on; None if its tensors are in other states."""
        try:
            return cls(optimizer, row)
        except Unlike:
            return None

    def _put(self, state: defaultdict[Tensor, State], groups: Sequence[list[nn.Parameter]]) -> None:
        self.optimizer.state = state
        for group, own in zip(self.optimizer.param_groups, groups):
            group["params"] = own

    def attach(self, row: Row) -> None:
        """Have the vectors be slices of this row."""
        assert row.value is not None and row.gradient is not None
        start = 0
        for vector, size in zip(self.vectors, self.sizes):
            vector.data, vector.grad = row.value[start : start + size], row.gradient[start : start + size]
            start += size

    def hold(self, row: Row) -> None:
        """Have the gradients of this row again, if somebody has called `zero_grad`."""
        if any([vector.grad is None for vector in self.vectors]):
            self.attach(row)

    def detach(self) -> None:
        """Let go of the row."""
        for vector in self.vectors:
            vector.grad, vector.data = None, vector.data.new_empty(0)

    def state(self) -> defaultdict[Tensor, State]:
        """Return the state by tensor, as views."""
        found: defaultdict[Tensor, State] = defaultdict(dict)
        for own, vector, size in zip(self.parameters, self.vectors, self.sizes):
            if vector in self.optimizer.state:
                found.update(zip(own, split(self.optimizer.state[vector], own, size)))
        return found

    def split(self) -> None:
        """Give the optimizer its parameters back, for good."""
        self._put(self.state(), self.parameters)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Have the optimizer show its parameters within the block."""
        state = self.optimizer.state
        self._put(self.state(), self.parameters)
        try:
            yield
        finally:
            self._put(state, [[v] for v in self.vectors])


class Unlike(Exception):
    """States of tensors that have no common one."""


def joined(states: Sequence[State], parameters: Sequence[nn.Parameter], vector: Tensor) -> State:
    """Return the state of a vector from those of the tensors in it.

    Raises:
        Unlike: they have made other numbers of steps, for instance.
    """
    if not any(states):
        return {}
    found, (places, _) = State(), places_of(parameters)
    if any(s.keys() != states[0].keys() for s in states):
        raise Unlike
    for key, first in states[0].items():
        values = [s[key] for s in states]
        if all(isinstance(v, Tensor) and v.shape == p.shape for v, p in zip(values, parameters)):
            found[key] = torch.zeros(vector.shape, dtype=first.dtype, device=first.device)
            for (start, stop), value in zip(places, values):
                found[key][start:stop].copy_(value.flatten())
        elif all(same(first, value) for value in values):
            found[key] = first.clone() if isinstance(first, Tensor) else first
        else:
            raise Unlike
    return found


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dim() == 0 and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def split(state: State, parameters: Sequence[nn.Parameter], size: int) -> Iterator[State]:
    """Yield the state of each tensor of a vector of so many numbers."""
    for p, (start, stop) in zip(parameters, places_of(parameters)[0]):
        own = State()
        for key, value in state.items():
            if isinstance(value, Tensor):
                value = value[start:stop].view(p.shape) if value.shape == (size,) else value.clone()
            own[key] = value
        yield own
