# SPDX-License-Identifier: Apache-2.0
"""What layers of the stacks of experts hand inwards, to the module that graft runs in its own place.

Each layer of a stack adds its parts and calls what is beneath; the innermost module then runs with all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from graft.core.errors import RoutingError
from graft.core.rows import Rows
from graft.kernels.experts import FormedUpdate, LowRankUpdate
from graft.kernels.waits import constant

if TYPE_CHECKING:
    from graft.core.protocols import Layer

HANDED = "_graft_handed"  # mark on the innermost module, while layers around it run


class Own(NamedTuple):
    """A part of a stack, before the number of tokens is known."""

    part: LowRankUpdate | FormedUpdate  # without a gate
    gate: Callable[[int], Tensor] | None = None  # number of tokens → (tokens,)


@dataclass(frozen=True)
class Groups:
    """The rows of a batch by adapter, as numbers of tokens: blocks flatten a batch row by row."""

    rows: Rows

    @property
    def count(self) -> int:
        return len(self.rows.groups)

    def of_tokens(self, tokens: int, key: str, device: torch.device) -> Tensor:
        """Return the number of each token's group, (tokens,)."""
        batch = self.rows.batch
        if tokens % batch:
            raise RoutingError(
                f"layer '{key}' received {tokens} tokens in a mixed batch of {batch} samples, which do not tell which "
                "is of which sample. Run one adapter at a time, or make adapters that leave this layer out."
            )
        numbers = [0] * batch
        for i, own in enumerate(self.rows.groups.values()):
            for row in own:
                numbers[row] = i
        return constant(tuple(numbers), torch.long, device).repeat_interleave(tokens // batch)


@dataclass
class Handed:
    """The parts by stack, and the rows that they are for; None: all."""

    key: str = ""  # of the layer that began
    groups: Groups | None = None
    parts: dict[str, Sequence[Own]] = field(default_factory=dict)

    def parts_of(self, name: str, tokens: int) -> list[LowRankUpdate | FormedUpdate]:
        own = self.parts.get(name, ())
        return [p.part if p.gate is None else p.part._replace(gate=p.gate(tokens)) for p in own]

    def group_of(self, tokens: int, device: torch.device) -> Tensor | None:
        return None if self.groups is None else self.groups.of_tokens(tokens, self.key, device)


def route(
    layer: Layer,
    owner: nn.Module,
    args: tuple[object, ...],
    kwargs: dict[str, object],
    parts: Sequence[Own],
    groups: Groups | None,
) -> object:
    """Return the output of a layer's base, of which `owner` is the innermost module, with these parts on its stack."""
    name, experts = layer.site.parameter, layer.site.experts
    handed = owner.__dict__.get(HANDED)
    if handed is not None:  # a layer around this one has begun
        handed.parts[name] = parts
        return layer.base_layer(*args, **kwargs)
    handed = Handed(layer.site.key, groups, {name: parts})
    place = "_old_forward" if "_old_forward" in owner.__dict__ else "forward"  # accelerate's hooks call the first
    before = owner.__dict__.get(place)
    owner.__dict__[HANDED] = handed
    owner.__dict__[place] = lambda *args, **kwargs: experts(owner, handed, args, kwargs)
    try:
        return layer.base_layer(*args, **kwargs)
    finally:
        del owner.__dict__[HANDED], owner.__dict__[place]
        if before is not None:
            owner.__dict__[place] = before


route._torchdynamo_disable = True  # type: ignore[attr-defined]  # the host needs to know how many rows experts have
