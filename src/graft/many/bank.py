# SPDX-License-Identifier: Apache-2.0
"""Banks: all tensors of an adapter, and their gradients, are slices of one flat vector, a row.

Adapters of equal shapes are rows of one matrix, a bank.

So an optimizer updates one Parameter per adapter. Layers find the factors of neighbouring adapters stacked, and compute
their products together (`kernels/segments.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

LONG = 2**20  # numbers: float32 sums of more squares lose digits
LINE = 32  # numbers of 16 bits and more: each tensor begins at a line of memory, as tensors by themselves do

HOOKS = (attrgetter("_backward_hooks"), attrgetter("_post_accumulate_grad_hooks"))  # of a tensor
requires_grad, read_grad = attrgetter("requires_grad"), attrgetter("grad")

Parameters = Sequence[nn.Parameter]


class AdapterRow:
    """The tensors of one adapter, and their gradients.

    Attributes:
        parameters: in the order of the row.
        model_order: for each parameter in the order of the model, its index in `parameters`.
        gradients: one for each parameter. An entry is only valid where `received` is True.
        received: for each parameter, True if the last pass gave a gradient.
        value, gradient: (P,), the row of the bank; None if the adapter is in no bank.
        bank, number: the bank, and the number of the row there.
    """

    def __init__(self, parameters: Parameters, in_model: Parameters) -> None:
        """Note the parameters and the order of `in_model`. No gradient has been received, and the row is in no bank."""
        self.parameters, where = list(parameters), {id(p): i for i, p in enumerate(parameters)}
        self.model_order = tuple(where[id(p)] for p in in_model)
        self.gradients: list[Tensor | None] = [None] * len(self.parameters)
        self.received = [False] * len(self.parameters)
        self.value: Tensor | None = None
        self.gradient: Tensor | None = None
        self.bank: Bank | Any = None
        self.number = 0  # in the bank
        self.addresses: list[int] = []  # of the parameters' memory, when the banks were made

    def is_intact(self) -> bool:
        """Return False if a parameter has other memory than when the banks were made, or was frozen, or if one in a
        bank has got a hook.
        """
        return (
            list(map(Tensor.data_ptr, self.parameters)) == self.addresses
            and all(map(requires_grad, self.parameters))
            and (self.value is None or not any([any(map(read_hooks, self.parameters)) for read_hooks in HOOKS]))
        )

    @property
    def holds_gradients(self) -> bool:
        """Return True if the `grad` of a parameter is not None."""
        return any([grad is not None for grad in map(read_grad, self.parameters)])

    @property
    def is_complete(self) -> bool:
        """Return True if the last pass gave a gradient for every parameter."""
        return all(self.received)

    def copy_gradients(self) -> list[Tensor | None]:
        """Return the gradients by parameter in the row's order, None for those not marked in `received`.

        In a bank they are views of one clone of the whole row, which later passes do not overwrite. For a row in no
        bank they are the entries of `gradients` themselves.
        """
        if self.gradient is None:
            return [g if got else None for g, got in zip(self.gradients, self.received)]
        clone = self.gradient.clone()
        views = (clone[a:b].view(p.shape) for (a, b), p in zip(self.bank.spans, self.parameters))
        return [view if got else None for view, got in zip(views, self.received)]

    def add_gradients(self, earlier: Sequence[Tensor | None]) -> None:
        """Add the gradients of earlier batches to those of the last pass, in place. A None in `earlier` is skipped.

        A parameter that the last pass gave no gradient takes the earlier one: copied into the bank's slice, or the
        tensor itself if there is no bank. `received` becomes True for it.
        """
        additions = list[tuple[Any, Tensor]]()
        for i, (gradient, addend) in enumerate(zip(self.gradients, earlier)):
            if addend is None:
                continue
            if self.received[i]:
                additions.append((gradient, addend))
            elif gradient is None or self.gradient is None:
                self.gradients[i] = addend
            else:
                gradient.copy_(addend)
            self.received[i] = True
        if additions:
            torch._foreach_add_([to for to, _ in additions], [value for _, value in additions])


class Sink:
    """One tensor of one adapter, or of n neighbouring ones as one leaf of autograd, and the memory for its gradient.

    Attributes:
        tensor: a Parameter; or (n, …), a view of the bank's values that requires gradients.
        gradient: the view of the bank's gradients that has the gradient after a pass.
        memory: contiguous; kernels write the gradient there during a pass. `gradient` itself for one adapter.
        first, rows: number of the first adapter in the bank; the rows of all.
        place: index of the tensor in their `parameters`.
        is_filled: True if `memory` has a gradient of this pass.
    """

    def __init__(
        self, tensor: Tensor, gradient: Tensor, rows: list[AdapterRow], place: int, memory: Tensor, users: list[Sink]
    ) -> None:
        """Hold the tensors. Sinks with the same list of `users`, of this pass, may overlap in `memory`."""
        self.tensor, self.gradient, self.first, self.rows, self.place = tensor, gradient, rows[0].number, rows, place
        self.memory, self._common, self._users, self.is_filled = memory, memory, users, False

    def claim(self) -> Tensor | None:
        """Return `memory` for the first gradient of the pass, and mark it as filled; None for a later one.

        The sink is noted as a user of the memory that stacks share. If an earlier user has some of these adapters,
        `memory` becomes a new tensor for this pass.
        """
        if self.is_filled:
            return None
        self.is_filled = True
        if self._users:
            stop = self.first + len(self.rows)
            if any(user.first < stop and self.first < user.first + len(user.rows) for user in self._users):
                self.memory = torch.empty_like(self._common)
        self._users.append(self)
        return self.memory

    def empty(self) -> None:
        """Forget the gradient of the pass; an empty sink does nothing.

        The sink gets the shared memory again, and the list of its users becomes empty.
        """
        if self.is_filled:
            self.is_filled, self.memory = False, self._common
            self._users.clear()

    def add(self, gradient: Tensor) -> None:
        """Add a later gradient of the pass to `memory`, in place."""
        self.memory += gradient


class Bank:
    """The bank of adapters of equal shapes, and of one dtype and device.

    Their Parameters keep identity and name, and become views of `values`.

    Attributes:
        values, gradients: (adapters, P). Gaps between tensors stay zero in both.
        spans: start and end of each tensor in a row.
        memories: by place of a tensor, the memory for gradients that stacks of rows share, and its users in this pass.
    """

    def __init__(self, rows: Sequence[AdapterRow]) -> None:
        """Allocate both matrices, copy each parameter into its slice, and replace the data of the Parameter by this
        slice. Each row gets its vectors and views of gradients.
        """
        self.rows, first = list(rows), rows[0].parameters
        self.spans, size = lay_out_row(first)
        with torch.no_grad():
            self.values = torch.zeros(len(rows), size, dtype=first[0].dtype, device=first[0].device)
            self.gradients = torch.zeros_like(self.values)
            for i, (row, value, gradient) in enumerate(zip(rows, self.values, self.gradients)):
                row.bank, row.number = self, i
                row.value, row.gradient, row.gradients = value, gradient, []
                for p, (start, stop) in zip(row.parameters, self.spans):
                    p.data = value[start:stop].view(p.shape).copy_(p)
                    row.gradients.append(gradient[start:stop].view(p.shape))
        # by place: (adapters, size), contiguous, uninitialized; and the sinks that use it in this pass
        self.memories: dict[int, tuple[Tensor, list[Sink]]] = {}

    def compute_norms(self, order: Iterable[int] | None, rows: Sequence[int]) -> Tensor:
        """Return the norm of all gradients of each of these rows, (len(rows),).

        `order` is the order of the tensors, so that the bits equal those of `get_total_norm`. None: of the whole row at
        once, which is faster and close to that. As many `rows` as the bank has must be in the bank's order: they are
        not looked up.
        """
        some = self.gradients if len(rows) == len(self.rows) else self.gradients[rows]
        if order is None:
            return torch.linalg.vector_norm(some, dim=1)
        each = [torch.linalg.vector_norm(some[:, a:b], dim=1) for a, b in (self.spans[i] for i in order)]
        return torch.linalg.vector_norm(torch.stack(each, 1), dim=1)


class Banks:
    """The banks of adapters that train together. Layers use them as `Stacks`.

    Attributes:
        rows: by name of the adapter, also for adapters in no bank.
        index: id of a Parameter → (bank, place, row), for those in a bank.
    """

    def __init__(self, adapters: Mapping[str, tuple[Parameters, Parameters]], tensors: Iterable[Tensor]) -> None:
        """Put adapters with equal shapes, dtypes and devices into one bank each, in the order of `adapters`.

        Their parameters move into the banks' memory. Adapters in no bank have a row, too.

        Args:
            adapters: by name, the parameters in the order of the row and in the order of the model.
            tensors: all tensors of the model. An adapter stays out of banks if it shares memory with one of them, mixes
                dtypes or devices, has hooks, or is refused by `can_share_row` otherwise.
        """
        memories = Counter(t.untyped_storage().data_ptr() for t in tensors)
        self.rows = {name: AdapterRow(*orders) for name, orders in adapters.items()}
        by_layout: dict[tuple[object, ...], list[AdapterRow]] = {}  # by the traits that adapters of one bank share
        for row in self.rows.values():
            if can_share_row(row.parameters, memories):
                by_layout.setdefault(tuple((p.shape, p.dtype, p.device) for p in row.parameters), []).append(row)
        self.banks = [Bank(rows) for rows in by_layout.values()]
        self.index: dict[int, tuple[Bank, int, int]] = {}  # (bank, place, row) by Parameter
        self._singles: dict[int, Sink] = {}  # by id of the Parameter
        self._stacks: dict[tuple[int, int], Sink] = {}  # by id of the first Parameter, and number of rows
        self._by_stack: dict[int, Sink] = {}  # by id of the stacked tensor
        for row in self.rows.values():
            row.addresses = [p.data_ptr() for p in row.parameters]
            if row.bank is not None:
                self.index.update((id(p), (row.bank, place, row.number)) for place, p in enumerate(row.parameters))

    def is_intact(self) -> bool:
        """Return True if all rows are intact."""
        return all([row.is_intact() for row in self.rows.values()])

    def separate_memory(self) -> None:
        """Replace the data of each parameter of a bank by a clone. The rows and banks themselves stay as they are."""
        for p in (p for bank in self.banks for row in bank.rows for p in row.parameters):
            p.data = p.data.clone()

    def follows(self, a: Tensor, b: Tensor) -> bool:
        """Return True if both are Parameters of one bank, at the same place, and the row of `b` is directly after the
        row of `a`.
        """
        one, two = self.index.get(id(a)), self.index.get(id(b))
        return one is not None and two is not None and one[:2] == two[:2] and one[2] + 1 == two[2]

    def stack(self, first: Tensor, n: int) -> Tensor:
        """Return the stacked tensor (n, …) of `first`, which must be in a bank, and its place in the n - 1 rows after
        it. Raises KeyError if `first` is in no bank.

        The tensor is a view of the bank's values, which requires gradients. It is made at the first call and cached,
        with its sink. All stacks of a place share one memory for gradients of all rows, made by the first of them.
        """
        key = id(first), n
        if key not in self._stacks:
            bank, place, row = self.index[id(first)]
            (start, stop), shape = bank.spans[place], first.shape
            value, gradient = (t[row : row + n, start:stop].view(n, *shape) for t in (bank.values, bank.gradients))
            if place not in bank.memories:
                bank.memories[place] = bank.values.new_empty(len(bank.rows), stop - start), []
            memory, users = bank.memories[place]
            rows, memory = bank.rows[row : row + n], memory[row : row + n].view(n, *shape)
            self._stacks[key] = sink = Sink(value.requires_grad_(), gradient, rows, place, memory, users)
            self._by_stack[id(sink.tensor)] = sink
        return self._stacks[key].tensor

    def sink(self, t: Tensor) -> Sink | None:
        """Return the memory for the gradient of a stacked tensor or of a Parameter in a bank; None for another one.

        A Parameter's sink is made at the first call and cached; its memory is the bank's own.
        """
        if (sink := self._by_stack.get(id(t)) or self._singles.get(id(t))) is not None or id(t) not in self.index:
            return sink
        bank, place, number = self.index[id(t)]
        row: Any = bank.rows[number]
        self._singles[id(t)] = sink = Sink(t, row.gradients[place], [row], place, row.gradients[place], [])
        return sink

    def drop_gradients(self, names: Iterable[str]) -> None:
        """Forget the gradients of these adapters before a pass: `received` becomes False, and `grad` of their
        parameters None. All sinks, also those of other adapters, become empty, and `grad` of all stacked tensors None.
        """
        for name in names:
            row = self.rows[name]
            row.received = [False] * len(row.received)
            if row.holds_gradients:
                for p in row.parameters:
                    p.grad = None
        for sink in (*self._singles.values(), *self._stacks.values()):
            sink.empty()
        for sink in self._stacks.values():
            sink.tensor.grad = None

    @torch.no_grad()
    def collect_gradients(self, names: Iterable[str]) -> None:
        """Move the gradients of a pass to the rows of adapters, set `received` for each of them, and set each `grad` to
        None.

        Sinks of all adapters are emptied; gradients in those of single parameters are in the bank already. A `grad` of
        a stacked tensor first goes into the memory of its sink. Gradients of stacks are copied into the bank, or added
        for parameters that have received one before. For each adapter of `names` that holds gradients, each `grad` is
        then copied or added likewise; parameters without `grad` are skipped. An adapter in no bank keeps the tensor
        itself. All copies are made in one call at the end, then all additions.
        """
        copies, additions = list[tuple[Any, Tensor]](), list[tuple[Any, Tensor]]()  # added to an earlier gradient
        for sink in (sink for sink in self._singles.values() if sink.is_filled):
            sink.rows[0].received[sink.place] = True
            sink.empty()
        for sink in self._stacks.values():
            if (grad := sink.tensor.grad) is not None:
                sink.tensor.grad = None
                if (memory := sink.claim()) is None:
                    sink.add(grad)
                else:
                    memory.copy_(grad)
            if not sink.is_filled:
                continue
            if any([row.received[sink.place] for row in sink.rows]):
                for row, gradient, memory in zip(sink.rows, sink.gradient, sink.memory):
                    (additions if row.received[sink.place] else copies).append((gradient, memory))
            else:
                copies.append((sink.gradient, sink.memory))
            for row in sink.rows:
                row.received[sink.place] = True
            sink.empty()
        for row in (row for name in names if (row := self.rows[name]).holds_gradients):
            for i, p in enumerate(row.parameters):
                grad = p.grad
                if grad is None:
                    continue
                p.grad = None
                if row.gradient is None:
                    row.gradients[i] = grad
                else:
                    (additions if row.received[i] else copies).append((row.gradients[i], grad))
                row.received[i] = True
        if copies:
            torch._foreach_copy_([to for to, _ in copies], [value for _, value in copies])
        if additions:
            torch._foreach_add_([to for to, _ in additions], [value for _, value in additions])

    def compute_norms(self, names: Mapping[str, bool]) -> list[Tensor]:
        """Return for each name the norm of its gradients, (), in the order of `names`.

        If its value is True, or the row has more than `LONG` numbers, it has the bits of `get_total_norm` in the
        model's order; else it is close to that. One call computes the norms of adapters in one bank with all gradients.
        An adapter in no bank, or with gradients missing, gets the norm of those received.
        """
        norms, shared = dict[str, Tensor](), dict[tuple[Bank, tuple[int, ...] | None], dict[str, int]]()
        for name, exact in names.items():
            row = self.rows[name]
            if row.gradient is None or not row.is_complete:
                norms[name] = get_total_norm([row.gradients[i] for i in row.model_order if row.received[i]])  # type: ignore[misc]
                continue
            order = row.model_order if exact or len(row.gradient) > LONG else None
            shared.setdefault((row.bank, order), {})[name] = row.number
        for (bank, order), numbers in shared.items():
            norms.update(zip(numbers, bank.compute_norms(order, [*numbers.values()])))
        return [norms[name] for name in names]


def can_share_row(parameters: Parameters, memories: Mapping[int, int]) -> bool:
    """Return True if these parameters may become slices of one vector: there is at least one, and all have one dtype
    and device.

    Each must be a plain nn.Parameter that requires gradients, strided, contiguous, not on meta, without hooks, and
    alone in its memory.

    memories: data pointer of a storage → how many tensors use it; 1 if it is missing.
    """
    if not parameters or len({(p.dtype, p.device) for p in parameters}) > 1:
        return False
    return all(
        type(p) is nn.Parameter
        and p.requires_grad
        and p.layout == torch.strided
        and p.is_contiguous()
        and not p.is_meta
        and memories.get(p.untyped_storage().data_ptr(), 1) == 1
        and not any(read_hooks(p) for read_hooks in HOOKS)
        for p in parameters
    )


def lay_out_row(parameters: Parameters) -> tuple[list[tuple[int, int]], int]:
    """Return the start and end of each tensor in a row, and the length of the row.

    Each tensor begins at a multiple of `LINE` (32) numbers, and the length is rounded up to one.
    """
    places, end = [], 0
    for p in parameters:
        places.append((end, end + p.numel()))
        end = -(-(end + p.numel()) // LINE) * LINE
    return places, end
