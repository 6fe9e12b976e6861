# SPDX-License-Identifier: Apache-2.0
"""What a call says of the rows of its batch: the adapter that each uses, how much adapters count, facts about each;
and a run of the model that is about to begin, as methods see it that surround it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import NoneType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from graft.core.errors import RoutingError
from graft.core.random import AdapterGenerators
from graft.kernels.segments import Stacks
from graft.kernels.waits import constant

BASE = "__base__"  # the row uses no adapter
EMPTY = torch.empty(0, dtype=torch.long, device="cpu")


class JointAdapters(NamedTuple):
    """Adapters that act on the same rows: each on what those before it made, or by weights, all on one output."""

    names: tuple[str, ...]
    weights: tuple[float, ...] | None = None


Key = str | JointAdapters | None  # of a group of rows: an adapter, several, or None for the base model


def adapters_in(key: Key) -> tuple[str, ...]:
    """Return the adapters of a group of rows."""
    return () if key is None else key.names if isinstance(key, JointAdapters) else (key,)


@dataclass(eq=False)
class Rows:
    """A batch grouped by adapter. Layers read tensors, on the device of the batch; the host has the same in lists."""

    batch: int
    groups: dict[Key, list[int]]  # rows by adapter, None for the base model
    in_order: bool  # the groups, one after the other, are the batch as it stands
    segments: tuple[tuple[Key, Tensor], ...]  # (adapter or None for the base model, row indices)
    order: Tensor  # the segments, one after the other
    inverse: Tensor  # the index that puts them back into the order of the batch
    elsewhere: dict[torch.device, Rows] = field(default_factory=dict)  # the same on other devices

    @classmethod
    def from_names(cls, names: Sequence[str | JointAdapters], device: torch.device | None = None) -> Rows:
        groups: dict[Key, list[int]] = {}
        for row, name in enumerate(names):
            groups.setdefault(None if name == BASE else name, []).append(row)
        return cls.from_groups(len(names), groups, device)

    @classmethod
    def from_groups(cls, batch: int, groups: dict[Key, list[int]], device: torch.device | None) -> Rows:
        """Make the indices, by one copy to the device; by none if the last batches had these groups, too."""
        listed = [row for rows in groups.values() for row in rows]
        places = sorted(range(batch), key=listed.__getitem__)
        order, inverse = constant((*listed, *places), torch.long, device).split(batch) if batch else (EMPTY, EMPTY)
        segments = zip(groups, order.split([len(rows) for rows in groups.values()]))
        return cls(batch, groups, listed == sorted(listed), tuple(segments), order, inverse)

    def on(self, device: torch.device) -> Rows:
        """Return the same rows with indices for tensors on that device."""
        if device == self.order.device:
            return self
        if device not in self.elsewhere:
            self.elsewhere[device] = self.from_groups(self.batch, self.groups, device)
        return self.elsewhere[device]

    @cached_property
    def sizes(self) -> list[int]:
        """How many rows each segment has."""
        return [len(rows) for rows in self.groups.values()]

    def sort_by_adapter(self, x: Tensor) -> Tensor:
        """Return x (batch, …) with the rows of the first adapter, then those of the second, …: x itself if it is so."""
        return x if self.in_order else x.index_select(0, self.order)

    def restore_order(self, x: Tensor) -> Tensor:
        """Undo `by_adapter`."""
        return x if self.in_order else x.index_select(0, self.inverse)

    @cached_property
    def keys(self) -> tuple[Key, ...]:
        """What the groups use, None for the base model."""
        return tuple(self.groups)

    @cached_property
    def names(self) -> tuple[str | None, ...]:
        """The adapters in the batch, None for the base model."""
        return tuple(dict.fromkeys(name for key in self.groups for name in (adapters_in(key) or (None,))))

    def rows_of(self, adapter: str) -> list[int]:
        """Return the rows that use an adapter, alone or among others."""
        return [row for key, rows in self.groups.items() if adapter in adapters_in(key) for row in rows]

    def index_of(self, adapter: str) -> Tensor:
        """Return the rows that use an adapter as a tensor on their device, in the order of their segments."""
        return torch.cat([index for key, index in self.segments if adapter in adapters_in(key)])

    @cached_property
    def adapter_groups(self) -> tuple[list[Key], Tensor, list[int], bool] | None:
        """The adapters, their rows, adapter by adapter, how many each has, and whether this is the batch as it stands;
        None unless there are several adapters."""
        adapted = [(name, index) for name, index in self.segments if name is not None]
        if len(adapted) < 2:
            return None
        whole = len(adapted) == len(self.segments)
        order = self.order if whole else torch.cat([index for _, index in adapted])
        return [name for name, _ in adapted], order, [len(index) for _, index in adapted], whole and self.in_order

    def take(self, x: Tensor, layer: str, ids: bool = False) -> Tensor:
        """Return `x` with one row per sample. Repeat ids that all samples share, such as positions."""
        if x.shape[0] == self.batch:
            return x
        if x.shape[0] == 1 and ids:
            return x.expand(self.batch, *x.shape[1:])
        raise RoutingError(
            f"layer '{layer}' received {x.shape[0]} rows in a mixed batch of {self.batch} samples: its input is not "
            "one row per sample, so rows cannot be given to adapters here. Run one adapter at a time, or exclude "
            "this layer with exclude_modules."
        )

    def groups_of_tokens(self, tokens: int, layer: str, device: torch.device) -> Tensor:
        """Return the number of each token's group of rows, (tokens,): blocks flatten a batch row by row.

        Raises:
            RoutingError: the rows do not have the same number of tokens.
        """
        if tokens % self.batch:
            raise RoutingError(
                f"layer '{layer}' received {tokens} tokens in a mixed batch of {self.batch} samples, which do not tell "
                "which is of which sample. Run one adapter at a time, or make adapters that leave this layer out."
            )
        numbers = {row: i for i, rows in enumerate(self.groups.values()) for row in rows}
        of_rows = constant(tuple(numbers[row] for row in range(self.batch)), torch.long, device)
        return of_rows.repeat_interleave(tokens // self.batch)


OFF = Rows.from_names(())  # stands for a call with all adapters disabled
UNCLEAR = Rows.from_names(())  # stands for the rows of a backward pass over calls with different rows


class Gates(Protocol):
    """The weight of each adapter in a call, for mixtures of adapters."""

    def apply(self, layer: Any, adapter: str, part: Tensor) -> Tensor:
        """Weigh the part that `adapter` adds to the output of `layer`."""
        ...

    def of_tokens(self, layer: Any, adapter: str, tokens: int) -> Tensor:
        """Return the weight of `adapter` for each token of a batch, row by row: (tokens,)."""
        ...

    def rows(self, index: Tensor) -> Gates:
        """Return the gates of some rows of the batch."""
        ...


class PerRow(Protocol):
    """A fact about each row of a batch: a tensor, or what can be indexed and repeated like one."""

    def __getitem__(self, index: Tensor, /) -> PerRow: ...
    def repeat_interleave(self, repeats: int, dim: int) -> PerRow: ...


def select_facts(fact: PerRow, index: Tensor) -> PerRow:
    """Return a fact about some rows: where the index is, if it is a tensor, which a caller may have elsewhere."""
    return fact.to(index.device)[index] if isinstance(fact, Tensor) else fact[index]


class Constant:
    """One value for all rows, whichever they are."""

    def __init__(self, value: Any):
        self.value = value

    def __getitem__(self, index: object) -> Constant:
        return self

    def repeat_interleave(self, repeats: int, dim: int) -> Constant:
        return self


Facts = Mapping[Any, PerRow]  # by whatever a method calls them
NO_FACTS: Facts = {}  # one object: identity tells calls without facts


class CallContext(NamedTuple):
    """All that a call says of its rows."""

    rows: Rows | None = None
    gates: Gates | None = None
    facts: Facts = NO_FACTS
    draws: AdapterGenerators | None = None
    some: Tensor | None = None  # indices of those rows that a layer sees now; None: all
    stacks: Stacks | None = None  # tensors of adapters that can share products
    copies: int = 1  # of each row of the base's input, where adapters act

    def __bool__(self) -> bool:
        return self.rows is not None or self.gates is not None or bool(self.facts)

    @property
    def identity(self) -> tuple[int, int, int]:
        """Equal for what is of one call."""
        return id(self.rows), id(self.gates), id(self.facts)

    def only(self, index: Tensor) -> CallContext:
        """Return gates and facts of some rows of the batch."""
        gates = None if self.gates is None else self.gates.rows(index)
        facts = {name: select_facts(fact, index) for name, fact in self.facts.items()} or NO_FACTS
        some = index if self.some is None else self.some[index]
        return self._replace(gates=gates, facts=facts, some=some)

    def repeat(self, copies: int) -> CallContext:
        """Return what a batch with `copies` of each row is given. Whoever makes gates makes them for that batch."""
        rows = self.rows
        if rows is not None:
            groups = {
                name: [row * copies + copy for row in group for copy in range(copies)]
                for name, group in rows.groups.items()
            }
            rows = Rows.from_groups(rows.batch * copies, groups, rows.order.device)
        facts = {k: v.repeat_interleave(copies, 0) for k, v in self.facts.items()} or NO_FACTS
        return self._replace(rows=rows, facts=facts)


NOTHING, ALL_OFF, AMBIGUOUS = CallContext(), CallContext(OFF), CallContext(UNCLEAR)


MAX_OBJECTS = 100_000  # objects of an output that `tensors_in` visits


def find_tensors(output: object) -> Iterator[Tensor]:
    """Yield the tensors in containers and in attributes of objects, such as dataclasses and caches, but not modules."""
    seen: set[int] = set()
    pending = [output]
    while pending and len(seen) < MAX_OBJECTS:
        item = pending.pop()
        if isinstance(item, (str, bytes, int, float, NoneType, nn.Module, type)) or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
            continue
        if isinstance(item, Mapping):
            pending += item.values()
        elif isinstance(item, (list, tuple, set, frozenset)):
            pending += item
        pending += getattr(item, "__dict__", {}).values()


Finish = Callable[[object], object]  # of the output of a run of the model
SHIFTED = ("ForCausalLM", "ForConditionalGeneration")  # losses that leave the first label of each row out


@dataclass
class Run:
    """A run of the model that is about to begin, for `Method.surround_run`, which may change `kwargs`."""

    inputs: tuple[object, ...]
    kwargs: dict[str, Any]
    graft_arguments: dict[str, object]  # arguments that are graft's and not the model's
    rows: Rows | None = None
    generates: bool = False  # the model's `generate` runs, and it its forward several times
    copies: int = 1  # of each row, which `generate` makes
    adapters: Sequence[str] = ()  # those that act and are of the class whose `around` is called
    shares: Mapping[str, float] = field(default_factory=dict)  # of the batch's copies on which adapters act: all else

    def share(self, adapter: str, model: nn.Module) -> Tensor | float:
        """Return the weight of an adapter's own loss, which is a mean.

        The weight is the share of the batch's copies on which the adapter acts. If the call says how many tokens the
        optimizer step has, the weight is also the share of the call's tokens in them: Trainer sums such losses.
        """
        share, items = self.shares.get(adapter, 1.0), self.find_argument("num_items_in_batch", model)
        labels = None if items is None else self.find_argument("shift_labels", model)
        if items is not None and labels is None:
            labels = self.find_argument("labels", model)
            twofold = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
            if isinstance(labels, Tensor) and getattr(model, "loss_type", None) in SHIFTED and not twofold:
                labels = labels[..., 1:]
        if not isinstance(labels, Tensor):
            return share
        return share * (labels != -100).sum() / torch.as_tensor(items, device=labels.device)

    def find_argument(self, name: str, model: nn.Module) -> Any:
        """Return what the call says under a name: to graft, or to the model, by its signature; None if nothing."""
        if name in self.graft_arguments or name in self.kwargs:
            return self.graft_arguments.get(name, self.kwargs.get(name))
        place = list_forward_arguments(model).index(name) if name in list_forward_arguments(model) else len(self.inputs)
        return self.inputs[place] if place < len(self.inputs) else None

    def name_arguments(self, model: nn.Module) -> dict[str, Any]:
        """Return all that the call says to the model's forward, by name."""
        return name_arguments(model, self.inputs, self.kwargs)

    def argument(self, name: str) -> Any:
        """Return an argument of the model; the caller need not name the first."""
        value = self.kwargs.get(name)
        return self.inputs[0] if value is None and name == "input_ids" and self.inputs else value


def list_forward_arguments(model: nn.Module) -> list[str]:
    """Return the names of the arguments that a model's forward lists, compiled or not."""
    return list(inspect.signature(getattr(model, "_orig_mod", model).forward).parameters)


def name_arguments(model: nn.Module, inputs: Sequence[object], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a model's forward by name, also those that are given by their place."""
    return {**dict(zip(list_forward_arguments(model), inputs)), **kwargs} if inputs else dict(kwargs)


def count_copies(model: object, inputs: Sequence[object], kwargs: Mapping[str, Any]) -> int:
    """Return how often the `generate` of a model repeats each row: for beams, or for several samples."""
    config = kwargs.get("generation_config") or next((value for value in inputs if hasattr(value, "num_beams")), None)
    configs = config, getattr(model, "generation_config", None)  # the model's fills in what the caller's leaves open

    def setting(name: str) -> int:
        values: list[int | None] = [kwargs.get(name), *(getattr(config, name, None) for config in configs)]
        return next((value for value in values if value), 1)

    return max(setting("num_beams"), setting("num_return_sequences"))


# caches of transformers

CACHES = ("cache", "past_key_values")  # the argument in transformers from 5.2x on, and before


def find_cache(arguments: Mapping[str, Any]) -> Any:
    """Return the cache among the arguments of a model's forward; None if there is none."""
    return next((arguments[name] for name in CACHES if arguments.get(name) is not None), None)


def count_cached_tokens(cache: Any) -> int | None:
    """Return how many tokens a cache has seen; None if it does not tell, as one of states alone (Mamba)."""
    layers = getattr(cache, "layers", ())
    if not hasattr(cache, "get_seq_length") or (layers and not any(hasattr(n, "get_seq_length") for n in layers)):
        return None
    return int(cache.get_seq_length())


def is_stateful(cache: Any) -> bool:
    """Return True if a layer of a cache has the state after the tokens that it has seen."""
    states = [getattr(layer, "has_previous_state", False) for layer in getattr(cache, "layers", ())]
    return any(any(state.values()) if isinstance(state, Mapping) else state for state in states)
