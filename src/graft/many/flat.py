# SPDX-License-Identifier: Apache-2.0
"""An optimizer that updates one Parameter for each of its groups, a slice of a bank's row, in place of many.

Optimizers that compute number by number give the same bits. Files do not show it: they hold the state by tensor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from graft.many.bank import AdapterRow, lay_out_row

ELEMENTWISE = frozenset(
    {
        optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.Adamax, optim.Adagrad, optim.Adadelta,
        optim.RMSprop, optim.Rprop, optim.ASGD,
    }
)  # fmt: skip

State = dict[str, Any]


def order_by_group(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Return the given parameters in the order of the optimizer's groups, then those that the optimizer does not have,
    in their order. Parameters that only the optimizer has are left out.
    """
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    ids_given, ids = {id(p) for p in parameters}, {id(p) for p in grouped}
    return [*(p for p in grouped if id(p) in ids_given), *(p for p in parameters if id(p) not in ids)]


def can_flatten(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> bool:
    """Return True if an optimizer may update one vector for these parameters: its class is exactly one of
    `ELEMENTWISE`, and its steps have no hooks.

    All its parameters must be among these, and none a scalar. In a fused group each must end at a line of memory, since
    that kernel rounds the end of a tensor differently.
    """
    if type(optimizer) not in ELEMENTWISE or is_step_hooked(optimizer):
        return False
    ids = {id(p) for p in parameters}
    for group in optimizer.param_groups:
        # that kernel rounds otherwise where a tensor ends within a vector of the CPU: not at a line of 64 bytes
        line = 64 if group.get("fused") else 1
        if not all(id(p) in ids and p.dim() and p.numel() * p.element_size() % line == 0 for p in group["params"]):
            return False
    return True


def is_step_hooked(optimizer: Optimizer) -> bool:
    """Return True if an optimizer has hooks before or after its steps."""
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


def are_settings_equal(a: Optimizer, b: Optimizer) -> bool:
    """Return True if two optimizers have exactly one class and as many groups, and their groups equal keys and
    settings, apart from the parameters.
    """
    if type(a) is not type(b) or len(a.param_groups) != len(b.param_groups):
        return False
    for one, two in zip(a.param_groups, b.param_groups):
        if one.keys() != two.keys() or not all(
            [k == "params" or v is two[k] or bool(v == two[k]) for k, v in one.items()]
        ):
            return False
    return True


def step_together(optimizers: Sequence[Optimizer]) -> None:
    """Make a step of each of these optimizers, which have equal settings, by one call of the first one's `step`.

    Meanwhile each group of the first one has the parameters of this group of all, and the first one the state of all.
    Afterwards, also after an error, each has its parameters and state again, and the followers are marked as stepped,
    which schedules look for.
    """
    first, *followers = optimizers
    parameters = [list(group["params"]) for group in first.param_groups]
    try:
        for optimizer in followers:
            first.state.update(optimizer.state)
            for group, its in zip(first.param_groups, optimizer.param_groups):
                group["params"] = group["params"] + its["params"]
        first.step()
    finally:
        for group, members in zip(first.param_groups, parameters):
            group["params"] = members
        for optimizer in followers:
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                if p in first.state:
                    optimizer.state[p] = first.state.pop(p)
            optimizer._opt_called = True  # type: ignore[attr-defined]  # as schedules want it


class FlatParameters:
    """The vectors that replace the parameters in an optimizer, one for each group.

    Attributes:
        parameters: the original parameters of each group.
        vectors: a Parameter for each group, a slice of the row.
    """

    def __init__(self, optimizer: Optimizer, row: AdapterRow):
        """Make a vector for each group from `row`, join the optimizer's state into state of vectors, and put both into
        the optimizer.

        Raises:
            UnequalStates: tensors of a group have states that cannot be joined. The optimizer is then as it was.
        """
        self.optimizer = optimizer
        self.parameters: list[list[nn.Parameter]] = [list(group["params"]) for group in optimizer.param_groups]
        self.sizes = [lay_out_row(members)[1] for members in self.parameters]
        assert row.value is not None
        self.vectors = [nn.Parameter(row.value.new_empty(0)) for _ in self.parameters]
        self.attach_row(row)
        state: dict[nn.Parameter, State] = {}
        for members, vector in zip(self.parameters, self.vectors):
            state[vector] = join_states([optimizer.state.get(p, {}) for p in members], members, vector)
        self._set_state(defaultdict(dict, {v: s for v, s in state.items() if s}), [[v] for v in self.vectors])

    @classmethod
    def try_flatten(cls, optimizer: Optimizer, row: AdapterRow) -> FlatParameters | None:
        """Return the vectors of an optimizer, which uses them from now on.

        Return None, and change nothing, if the states of its tensors cannot be joined.
        """
        try:
            return cls(optimizer, row)
        except UnequalStates:
            return None

    def _set_state(self, state: defaultdict[Tensor, State], groups: Sequence[list[nn.Parameter]]) -> None:
        """Give the optimizer a state, and each of its groups a list of parameters."""
        self.optimizer.state = state
        for group, members in zip(self.optimizer.param_groups, groups):
            group["params"] = members

    def attach_row(self, row: AdapterRow) -> None:
        """Make the vectors slices of this row: data and gradient. The row must be in a bank.

        The vectors follow each other in the row, each with its size.
        """
        assert row.value is not None and row.gradient is not None
        start = 0
        for vector, size in zip(self.vectors, self.sizes):
            vector.data, vector.grad = row.value[start : start + size], row.gradient[start : start + size]
            start += size

    def detach_row(self) -> None:
        """Free the vectors of the row: they become empty, without gradient. The optimizer's state stays."""
        for vector in self.vectors:
            vector.grad, vector.data = None, vector.data.new_empty(0)

    def state(self) -> defaultdict[Tensor, State]:
        """Return the optimizer's state by original tensor, split by `split_vector_state`: views of the state of
        vectors, and clones of scalars.

        A group without state is left out.
        """
        states: defaultdict[Tensor, State] = defaultdict(dict)
        for members, vector, size in zip(self.parameters, self.vectors, self.sizes):
            if vector in self.optimizer.state:
                states.update(zip(members, split_vector_state(self.optimizer.state[vector], members, size)))
        return states

    def restore_parameters(self) -> None:
        """Give the optimizer its original parameters and their state for good."""
        self._set_state(self.state(), self.parameters)

    @contextmanager
    def show_parameters(self) -> Iterator[None]:
        """Within the block, give the optimizer its original parameters with their state.

        Afterwards it has the vectors and their state again.
        """
        state = self.optimizer.state
        self._set_state(self.state(), self.parameters)
        try:
            yield
        finally:
            self._set_state(state, [[v] for v in self.vectors])


class UnequalStates(Exception):
    """The states of tensors cannot be joined into the state of one vector."""


def join_states(states: Sequence[State], parameters: Sequence[nn.Parameter], vector: Tensor) -> State:
    """Return the state of a vector from the states of its tensors; an empty one if no tensor has state.

    Values with the shapes of all tensors are copied into a vector of zeros, with dtype and device of the first. A value
    that is equal for all tensors is taken once, tensors as a clone.

    Raises:
        UnequalStates: keys differ, or a value that is neither, such as different numbers of steps.
    """
    if not any(states):
        return {}
    state, (places, _) = State(), lay_out_row(parameters)
    if any(s.keys() != states[0].keys() for s in states):
        raise UnequalStates
    for key, first in states[0].items():
        values = [s[key] for s in states]
        if all(isinstance(v, Tensor) and v.shape == p.shape for v, p in zip(values, parameters)):
            state[key] = torch.zeros(vector.shape, dtype=first.dtype, device=first.device)
            for (start, stop), value in zip(places, values):
                state[key][start:stop].copy_(value.flatten())
        elif all(is_shared_value(first, value) for value in values):
            state[key] = first.clone() if isinstance(first, Tensor) else first
        else:
            raise UnequalStates
    return state


def is_shared_value(a: object, b: object) -> bool:
    """Return True for two equal scalar tensors, or two values of equal type and value.

    Tensors with dimensions are never equal here.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dim() == 0 and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def split_vector_state(state: State, parameters: Sequence[nn.Parameter], size: int) -> Iterator[State]:
    """Yield the state of each tensor from the state of a vector of `size` numbers.

    Tensors of this size become views in the tensor's shape, other tensors clones; other values stay.
    """
    for p, (start, stop) in zip(parameters, lay_out_row(parameters)[0]):
        tensor_state = State()
        for key, value in state.items():
            if isinstance(value, Tensor):
                value = value[start:stop].view(p.shape) if value.shape == (size,) else value.clone()
            tensor_state[key] = value
        yield tensor_state
