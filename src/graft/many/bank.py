# SPDX-License-Identifier: Apache-2.0
"""Banks: all tensors of an adapter, and their gradients, are slices of one flat vector, a row.

Adapters of equal shapes are rows of one matrix, a bank.

So an optimizer updates one Parameter per adapter. Layers find the factors of neighbouring adapters stacked, and compute
their products together (`kernels/segments.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

LINE = 32  # numbers of 16 bits and more: each tensor begins at a line of memory, as tensors by themselves do

Parameters = Sequence[nn.Parameter]


class AdapterRow:
    """The tensors of one adapter, and their gradients.

    Attributes:
        parameters: in the order of the row.
        model_order: for each parameter in the order of the model, its index in `parameters`.
        gradients: one for each parameter. An entry is only valid where `received` is True.
        received: for each parameter, True if the last pass gave a gradient.
        value, gradient: (P,), the row of the bank; None if the adapter is in no bank.
        spans: start and end of each parameter in `value`.
    """

    def __init__(self, parameters: Parameters, in_model: Parameters) -> None:
        """Note the parameters and the order of `in_model`. No gradient has been received, and the row is in no bank."""
        self.parameters, where = list(parameters), {id(p): i for i, p in enumerate(parameters)}
        self.model_order = tuple(where[id(p)] for p in in_model)
        self.gradients: list[Tensor | None] = [None] * len(self.parameters)
        self.received = [False] * len(self.parameters)
        self.value: Tensor | None = None
        self.gradient: Tensor | None = None
        self.spans: list[tuple[int, int]] = []

    @property
    def is_complete(self) -> bool:
        """Return True if the last pass gave a gradient for every parameter."""
        return all(self.received)

    def copy_gradients(self) -> list[Tensor | None]:
        """Return the gradients by parameter, None where the last pass gave none.

        In a bank they are views of one clone, which later passes do not overwrite; else they are the tensors
        themselves.
        """
        if self.gradient is None:
            return [g if got else None for g, got in zip(self.gradients, self.received)]
        clone = self.gradient.clone()
        views = (clone[a:b].view(p.shape) for (a, b), p in zip(self.spans, self.parameters))
        return [view if got else None for view, got in zip(views, self.received)]

    def add_gradients(self, earlier: Sequence[Tensor | None]) -> None:
        """Add the gradients of earlier batches to those of the last pass, in place. A None in `earlier` is skipped.

        A parameter that the last pass gave no gradient takes the earlier one: copied into the bank's slice, or the
        tensor itself if there is no bank. `received` becomes True for it.
        """
        both: tuple[list[Tensor], list[Tensor]] = ([], [])
        for i, (gradient, addend) in enumerate(zip(self.gradients, earlier)):
            if addend is None:
                continue
            if self.received[i]:
                both[0].append(gradient)  # type: ignore[arg-type]
                both[1].append(addend)
            elif gradient is None or self.gradient is None:
                self.gradients[i] = addend
            else:
                gradient.copy_(addend)
            self.received[i] = True
        if both[0]:
            torch._foreach_add_(*both)


class StackedTensor(NamedTuple):
    """One tensor of n neighbouring adapters as one leaf of autograd.

    Attributes:
        tensor: (n, …), a view of the bank's values that requires gradients.
        gradient: the view of the bank's gradients that receives its gradient.
        rows: of the adapters.
        place: index of the tensor in their `parameters`.
    """

    tensor: Tensor
    gradient: Tensor  # where its gradient goes
    rows: list[AdapterRow]
    place: int


class Bank:
    """The bank of adapters of equal shapes, and of one dtype and device.

    Their Parameters keep identity and name, and become views of `values`.

    Attributes:
        values, gradients: (adapters, P). Gaps between tensors stay zero in both.
        spans: start and end of each tensor in a row.
        stacked: `StackedTensor` by (place, first row, number of rows), filled by `get_stacked`.
    """

    def __init__(self, rows: Sequence[AdapterRow]) -> None:
        """Allocate both matrices, copy each parameter into its slice, and replace the data of the Parameter by this
        slice. Each row gets its vectors, spans and views of gradients.
        """
        self.rows, first = list(rows), rows[0].parameters
        self.spans, size = lay_out_row(first)
        with torch.no_grad():
            self.values = torch.zeros(len(rows), size, dtype=first[0].dtype, device=first[0].device)
            self.gradients = torch.zeros_like(self.values)
            for row, value, gradient in zip(rows, self.values, self.gradients):
                row.value, row.gradient, row.spans, row.gradients = value, gradient, self.spans, []
                for p, (start, stop) in zip(row.parameters, self.spans):
                    p.data = value[start:stop].view(p.shape).copy_(p)
                    row.gradients.append(gradient[start:stop].view(p.shape))
        self.stacked: dict[tuple[int, int, int], StackedTensor] = {}

    def get_stacked(self, place: int, first: int, n: int) -> StackedTensor:
        """Return the tensor number `place` of the `n` rows from number `first` on.

        It is made at the first call and cached.
        """
        key = place, first, n
        if key not in self.stacked:
            (start, stop), shape = self.spans[place], self.rows[0].parameters[place].shape
            value, gradient = (t[first : first + n, start:stop].view(n, *shape) for t in (self.values, self.gradients))
            self.stacked[key] = StackedTensor(value.requires_grad_(), gradient, self.rows[first : first + n], place)
        return self.stacked[key]

    def compute_norms(self, order: Iterable[int]) -> Tensor:
        """Return the norm of all gradients of each row, (adapters,).

        `order` is the order of the tensors, so that the bits equal those of `get_total_norm`.
        """
        each = [torch.linalg.vector_norm(self.gradients[:, a:b], dim=1) for a, b in (self.spans[i] for i in order)]
        return torch.linalg.vector_norm(torch.stack(each, 1), dim=1)


class Banks:
    """The banks of adapters that train together. Layers use them as `Stacks`.

    Attributes:
        rows: by name of the adapter, also for adapters in no bank.
        index: id of a Parameter → (bank, place, row), for those in a bank.
    """

    def __init__(self, adapters: Mapping[str, tuple[Parameters, Parameters]], tensors: Iterable[Tensor]) -> None:
        """Put adapters with equal shapes, dtypes and devices into one bank each, in the order of `adapters`.

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
        self.of_row = {id(row): (bank, i) for bank in self.banks for i, row in enumerate(bank.rows)}
        self.index: dict[int, tuple[Bank, int, int]] = {}  # (bank, place, row) by Parameter
        for bank in self.banks:
            for i, row in enumerate(bank.rows):
                self.index.update((id(p), (bank, place, i)) for place, p in enumerate(row.parameters))
        # each, where it lies, and whether that is a bank
        self._pointers = [(p, p.data_ptr(), r.value is not None) for r in self.rows.values() for p in r.parameters]

    @property
    def names(self) -> list[str]:
        """The names of the adapters, in or out of banks."""
        return list(self.rows)

    def is_intact(self) -> bool:
        """Return False if a parameter has got other memory since, or was frozen, or if one in a bank has got a hook."""
        for p, at, banked in self._pointers:
            if p.data_ptr() != at or not p.requires_grad or (banked and is_hooked(p)):
                return False
        return True

    def separate_memory(self) -> None:
        """Copy each parameter of a bank into separate memory. The rows and banks themselves stay as they are."""
        for p, _, banked in self._pointers:
            if banked:
                p.data = p.data.clone()

    def follows(self, a: Tensor, b: Tensor) -> bool:
        """Return True if both are Parameters of one bank, at the same place, and the row of `b` is directly after the
        row of `a`.
        """
        one, two = self.index.get(id(a)), self.index.get(id(b))
        return one is not None and two is not None and one[:2] == two[:2] and one[2] + 1 == two[2]

    def stack(self, first: Tensor, n: int) -> Tensor:
        """Return the stacked tensor (n, …) of `first`, which must be in a bank, and its place in the n - 1 rows after
        it.
        """
        bank, place, row = self.index[id(first)]
        return bank.get_stacked(place, row, n).tensor

    def drop_gradients(self, names: Iterable[str]) -> None:
        """Forget the gradients of these adapters before a pass: `received` becomes False, and `grad` of their
        parameters None. `grad` of every stacked tensor becomes None, too.
        """
        for name in names:
            row = self.rows[name]
            row.received = [False] * len(row.received)
            for p in row.parameters:
                p.grad = None
        for bank in self.banks:
            for leaf in bank.stacked.values():
                leaf.tensor.grad = None

    @torch.no_grad()
    def collect_gradients(self, names: Iterable[str]) -> None:
        """Move the gradients of a pass to the rows of these adapters, set `received`, and set each `grad` to None.

        Gradients of stacked tensors are copied into the banks, for all adapters. Those of single parameters are copied,
        or added if a stack gave one; an adapter in no bank keeps the tensor.
        """
        into, gradients = list[Tensor](), list[Tensor]()
        for bank in self.banks:
            for tensor, gradient, rows, place in bank.stacked.values():
                if tensor.grad is not None:
                    into.append(gradient)
                    gradients.append(tensor.grad)
                    tensor.grad = None
                    for row in rows:
                        row.received[place] = True
        later: tuple[list[Tensor], list[Tensor]] = ([], [])  # of parameters that some layer has run by themselves
        for row in (self.rows[name] for name in names):
            for i, p in enumerate(row.parameters):
                grad = p.grad
                if grad is None:
                    continue
                p.grad = None
                if row.gradient is None:
                    row.gradients[i] = grad
                elif row.received[i]:
                    later[0].append(row.gradients[i])  # type: ignore[arg-type]
                    later[1].append(grad)
                else:
                    into.append(row.gradients[i])  # type: ignore[arg-type]
                    gradients.append(grad)
                row.received[i] = True
        if into:
            torch._foreach_copy_(into, gradients)
        if later[0]:
            torch._foreach_add_(*later)

    def compute_norms(self, names: Iterable[str]) -> list[Tensor]:
        """Return for each name the norm of its gradients, (), to the bits of `get_total_norm` in the model's order.

        One call computes the norms of a whole bank, if an adapter is in one and has all gradients. Otherwise the norm
        is that of the gradients received.
        """
        norms, shared = list[Tensor](), dict[tuple[int, tuple[int, ...]], Tensor]()
        for row in (self.rows[name] for name in names):
            if row.gradient is None or not row.is_complete:
                norms.append(get_total_norm([row.gradients[i] for i in row.model_order if row.received[i]]))  # type: ignore[misc]
                continue
            bank, i = self.of_row[id(row)]
            key = id(bank), row.model_order
            if key not in shared:
                shared[key] = bank.compute_norms(row.model_order)
            norms.append(shared[key][i])
        return norms


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
        and not is_hooked(p)
        for p in parameters
    )


def ends_at_line(p: Tensor) -> bool:
    """Return True if the size of a tensor is a multiple of 64 bytes, so that it ends where a line of memory does."""
    return p.numel() % (64 // p.element_size()) == 0


def is_hooked(p: Tensor) -> bool:
    """Return True if a tensor has backward hooks or hooks after the accumulation of its gradient."""
    return bool(p._backward_hooks or p._post_accumulate_grad_hooks)


def lay_out_row(parameters: Parameters) -> tuple[list[tuple[int, int]], int]:
    """Return the start and end of each tensor in a row, and the length of the row.

    Each tensor begins at a multiple of `LINE` numbers.
    """
    places, end = [], 0
    for p in parameters:
        places.append((end, end + p.numel()))
        end = -(-(end + p.numel()) // LINE) * LINE
    return places, end
