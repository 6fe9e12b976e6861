# SPDX-License-Identifier: Apache-2.0
"""A bank: all tensors of an adapter, and their gradients, are slices of one flat vector, and adapters of equal shapes
are rows of one matrix. So an optimizer sees one Parameter per adapter, and layers find the factors of side-by-side
adapters at equal distances in memory, which lets them share products (`kernels/segments.py`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from graft.core.errors import ConfigError

LINE = 16  # numbers: each tensor begins at a line of memory, as tensors by themselves do

Named = Sequence[tuple[str, nn.Parameter]]


class Bank:
    """The bank of adapters of equal shapes. Their Parameters stay where they are, under their names, as views of it.

    Attributes:
        values, gradients: (adapters, P). Places between tensors stay zero in both.
        flat: by adapter, its row of `values` as one Parameter, with its row of `gradients` as `.grad`.

    Args:
        adapters: the trainable parameters of each, by its name, as `adapter_parameters` gives them.

    Raises:
        ConfigError: their shapes or dtypes differ, or a tensor is of two adapters.
    """

    def __init__(self, adapters: Mapping[str, Named]) -> None:
        held = {name: [p for _, p in named] for name, named in adapters.items()}
        first = next(iter(held))
        for name, own in held.items():
            if layout(own) != layout(held[first]):
                raise ConfigError(
                    f"Adapters '{first}' and '{name}' have tensors of other shapes, dtypes or devices, and so no bank "
                    "in common: give each its own (`banks_of`)."
                )
        everything = [id(p) for own in held.values() for p in own]
        if len(set(everything)) < len(everything):
            raise ConfigError(f"Adapters {list(held)} share tensors: they cannot train apart from each other.")
        self.parameters = held
        self.places, size = places_of(held[first])
        like = held[first][0]
        with torch.no_grad():
            self.values = torch.zeros(len(held), size, dtype=like.dtype, device=like.device)
            self.gradients = torch.zeros_like(self.values)
            self.flat: dict[str, nn.Parameter] = {}
            for row, (name, own) in enumerate(held.items()):
                for p, (start, stop) in zip(own, self.places):
                    place = self.values[row, start:stop].view(p.shape)
                    p.data = place.copy_(p)
                self.flat[name] = nn.Parameter(self.values[row])
        self.attach()

    def attach(self) -> None:
        """Have gradients go to the bank, also after a `zero_grad` that has dropped them."""
        for row, (name, own) in enumerate(self.parameters.items()):
            for p, (start, stop) in zip(own, self.places):
                p.grad = self.gradients[row, start:stop].view(p.shape)
            self.flat[name].grad = self.gradients[row]

    def zero(self, names: Iterable[str] | None = None) -> None:
        """Set the gradients of these adapters (None: of all) to zero, in place."""
        if names is None:
            self.gradients.zero_()
            return
        rows = {name: row for row, name in enumerate(self.parameters)}
        for name in names:
            self.gradients[rows[name]].zero_()


def banks_of(adapters: Mapping[str, Named]) -> Iterator[Bank]:
    """Yield banks for adapters of any shapes: one for all that are alike."""
    alike: dict[tuple[tuple[torch.Size, torch.dtype, torch.device], ...], dict[str, Named]] = {}
    for name, named in adapters.items():
        alike.setdefault(layout([p for _, p in named]), {})[name] = named
    yield from map(Bank, alike.values())


def layout(parameters: Sequence[Tensor]) -> tuple[tuple[torch.Size, torch.dtype, torch.device], ...]:
    """Return what adapters of one bank have in common."""
    return tuple((p.shape, p.dtype, p.device) for p in parameters)


def places_of(parameters: Sequence[Tensor]) -> tuple[list[tuple[int, int]], int]:
    """Return where each tensor begins and ends in a row, and how long a row is."""
    places, end = [], 0
    for p in parameters:
        places.append((end, end + p.numel()))
        end = -(-(end + p.numel()) // LINE) * LINE
    return places, end
