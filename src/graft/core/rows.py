# SPDX-License-Identifier: Apache-2.0
# Supported inside: rooms may import this module.
"""The facts that a call gives about the rows of its batch: the adapter of each row, gates, other facts.

Also a run of the model that is about to begin, as `Method.surround_run` sees it, and caches of transformers.

Facts are values for each row that a method reads in its layers, such as aLoRA's offsets or Poly's tasks; a method's
`surround_run` sets them for a run. A layer in a mixed batch sees the facts of its rows. `generate` copies rows, and
each copy has the facts of its row. Layers that a backward pass runs again see the facts of their forward pass. Methods
need no code for that.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    """Adapters that act on the same rows.

    Without `weights`, each acts on the output of those before it. With `weights`, all act on one output, and their
    parts are weighed.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...] | None = None


Key = str | JointAdapters | None  # the key of a group of rows: an adapter, several, or None for the base model


def adapters_in(key: Key) -> tuple[str, ...]:
    """Return the names of the adapters of a key: () for None, the base model."""
    return () if key is None else key.names if isinstance(key, JointAdapters) else (key,)


def make_index(numbers: Iterable[int], device: torch.device | None) -> Tensor:
    """Return numbers, such as those of rows, as an index on a device: a constant, which nobody may write to."""
    return constant(tuple(numbers), torch.long, device)


@dataclass(eq=False)
class Rows:
    """A batch with rows grouped by adapter. Layers read index tensors on the batch's device; lists are for the host."""

    batch: int
    groups: dict[Key, list[int]]  # rows by adapter, None for the base model
    in_order: bool  # the groups, one after the other, are the batch as it stands
    segments: tuple[tuple[Key, Tensor], ...]  # (adapter or None for the base model, row indices)
    order: Tensor  # the segments, one after the other
    inverse: Tensor  # the index that puts them back into the order of the batch
    elsewhere: dict[torch.device, Rows] = field(default_factory=dict)  # the same on other devices

    @classmethod
    def from_names(cls, names: Sequence[str | JointAdapters], device: torch.device | None = None) -> Rows:
        """Return the Rows of a batch with one name, or JointAdapters, per row.

        `BASE` becomes the key None. Groups come in the order of their first rows.
        """
        groups: dict[Key, list[int]] = {}
        for row, name in enumerate(names):
            groups.setdefault(None if name == BASE else name, []).append(row)
        return cls.from_groups(len(names), groups, device)

    @classmethod
    def from_groups(cls, batch: int, groups: dict[Key, list[int]], device: torch.device | None) -> Rows:
        """Return the Rows of a batch of `batch` rows, with the row numbers of each key in `groups`.

        All index tensors come by one copy to `device`. There is no copy if a recent batch had the same rows
        (`make_index`). A batch of 0 rows has empty tensors on the CPU.
        """
        listed = [row for rows in groups.values() for row in rows]
        places = sorted(range(batch), key=listed.__getitem__)
        order, inverse = make_index((*listed, *places), device).split(batch) if batch else (EMPTY, EMPTY)
        segments = zip(groups, order.split([len(rows) for rows in groups.values()]))
        return cls(batch, groups, listed == sorted(listed), tuple(segments), order, inverse)

    def to_device(self, device: torch.device) -> Rows:
        """Return the same rows with index tensors on `device`: this object if they are there.

        Else an object that is made once per device and kept in `elsewhere`.
        """
        if device == self.order.device:
            return self
        if device not in self.elsewhere:
            self.elsewhere[device] = self.from_groups(self.batch, self.groups, device)
        return self.elsewhere[device]

    @cached_property
    def sizes(self) -> list[int]:
        """Return a list with the number of rows of each group. Computed once."""
        return [len(rows) for rows in self.groups.values()]

    def sort_by_adapter(self, x: Tensor) -> Tensor:
        """Return x (batch, …) with the rows of the first group first, then those of the second, and so on.

        Returns x itself if its rows are in that order.
        """
        return x if self.in_order else x.index_select(0, self.order)

    def restore_order(self, x: Tensor) -> Tensor:
        """Return x with rows in the order of the batch again, after `sort_by_adapter`; x itself if that is the same."""
        return x if self.in_order else x.index_select(0, self.inverse)

    @cached_property
    def keys(self) -> tuple[Key, ...]:
        """Return the key of each group: an adapter, JointAdapters, or None for the base model. Computed once."""
        return tuple(self.groups)

    @cached_property
    def names(self) -> tuple[str | None, ...]:
        """Return each adapter in the batch once, also those within JointAdapters, and None if rows use the
        base model.
        """
        return tuple(dict.fromkeys(name for key in self.groups for name in (adapters_in(key) or (None,))))

    def rows_of(self, adapter: str) -> list[int]:
        """Return the numbers of the rows that use an adapter, directly or as one of JointAdapters."""
        return [row for key, rows in self.groups.items() if adapter in adapters_in(key) for row in rows]

    def index_of(self, adapter: str) -> Tensor:
        """Return the numbers of the rows that use an adapter, directly or as one of JointAdapters, in one tensor.

        It is on the batch's device, in the order of the segments. Raises an error of `torch.cat` if no row uses the
        adapter.
        """
        return torch.cat([index for key, index in self.segments if adapter in adapters_in(key)])

    @cached_property
    def adapter_groups(self) -> tuple[list[Key], Tensor, list[int], bool] | None:
        """Return the groups with adapters: their keys, their row numbers in one tensor, their sizes, and a flag.

        The flag is True if these rows are the whole batch, in its order. Returns None if fewer than two groups have
        adapters. The groups keep the order of `segments`.
        """
        adapted = [(name, index) for name, index in self.segments if name is not None]
        if len(adapted) < 2:
            return None
        whole = len(adapted) == len(self.segments)
        order = self.order if whole else torch.cat([index for _, index in adapted])
        return [name for name, _ in adapted], order, [len(index) for _, index in adapted], whole and self.in_order

    def expand_to_batch(self, x: Tensor, layer: str, ids: bool = False) -> Tensor:
        """Return x with one row per sample: x itself, or one row of ids (such as positions) expanded to the batch.

        Args:
            layer: the path of the layer, for the error.
            ids: x holds ids, so that a single row may count for all samples.

        Raises:
            RoutingError: x has another number of rows.
        """
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
        """Return the number of the group of each token, (tokens,) on `device`: the rows are flattened in order, equally
        long.

        Raises:
            RoutingError: `tokens` is no multiple of the number of rows. `layer` is the path for the error.
        """
        if tokens % self.batch:
            raise RoutingError(
                f"layer '{layer}' received {tokens} tokens in a mixed batch of {self.batch} samples, so that the "
                "sample of each is not known. Run one adapter at a time, or make adapters that leave this layer out."
            )
        numbers = {row: i for i, rows in enumerate(self.groups.values()) for row in rows}
        of_rows = make_index((numbers[row] for row in range(self.batch)), device)
        return of_rows.repeat_interleave(tokens // self.batch)


OFF = Rows.from_names(())  # the rows of a call with all adapters disabled
UNCLEAR = Rows.from_names(())  # the rows of a backward pass over calls with different rows


class Gates(Protocol):
    """The weight of each adapter in a call, for mixtures of adapters."""

    def apply(self, layer: Any, adapter: str, part: Tensor) -> Tensor:
        """Return `part`, the tensor that `adapter` adds to the output of `layer`, times the adapter's weight.

        A declaration only.
        """
        ...

    def of_tokens(self, layer: Any, adapter: str, tokens: int) -> Tensor:
        """Return the weight of `adapter` for each token of a batch, row by row: (tokens,). A declaration only."""
        ...

    def rows(self, index: Tensor) -> Gates:
        """Return the gates of the rows of the batch at `index`. A declaration only."""
        ...


class PerRow(Protocol):
    """A fact about each row of a batch: a tensor, or an object that can be indexed and repeated like one."""

    def __getitem__(self, index: Tensor, /) -> PerRow: ...
    def repeat_interleave(self, repeats: int, dim: int) -> PerRow:
        """Return the fact with each row `repeats` times in succession. A declaration only."""


def select_facts(fact: PerRow, index: Tensor) -> PerRow:
    """Return a fact for the rows at `index`.

    A tensor is moved to the device of `index` first, as callers may have it elsewhere.
    """
    return fact.to(index.device)[index] if isinstance(fact, Tensor) else fact[index]


class Constant:
    """A fact with one value for all rows. Indexing and repeating return the same object."""

    def __init__(self, value: Any):
        self.value = value

    def __getitem__(self, index: object) -> Constant:
        return self

    def repeat_interleave(self, repeats: int, dim: int) -> Constant:
        """Return this object; the arguments are ignored."""
        return self


Facts = Mapping[Any, PerRow]  # by the key that a method chooses
NO_FACTS: Facts = {}  # one object, so that identity tells calls without facts


class CallContext(NamedTuple):
    """Everything that a call tells layers about its rows."""

    rows: Rows | None = None
    gates: Gates | None = None
    facts: Facts = NO_FACTS
    draws: AdapterGenerators | None = None
    some: Tensor | None = None  # numbers of the rows of the batch that a layer sees now; None: all
    stacks: Stacks | None = None  # memory with tensors of adapters next to each other, which can share products
    copies: int = 1  # rows where adapters act for each row of the base's input
    may_draw: bool = False  # draws from torch's own generators are no error, since other threads make them

    def __bool__(self) -> bool:
        """Return True if the call has rows, gates or facts."""
        return self.rows is not None or self.gates is not None or bool(self.facts)

    @property
    def identity(self) -> tuple[int, int, int]:
        """Return the ids of rows, gates and facts: equal tuples belong to one call."""
        return id(self.rows), id(self.gates), id(self.facts)

    def narrow(self, index: Tensor) -> CallContext:
        """Return this context for the rows at `index` alone: gates and facts of them, and `some` with their numbers in
        the batch.

        `rows`, draws and all else stay as they are. If the context was narrowed before, `index` counts in its rows.
        """
        gates = None if self.gates is None else self.gates.rows(index)
        facts = {name: select_facts(fact, index) for name, fact in self.facts.items()} or NO_FACTS
        some = index if self.some is None else self.some[index]
        return self._replace(gates=gates, facts=facts, some=some)

    def repeat(self, copies: int) -> CallContext:
        """Return the context of a batch that has each row `copies` times in succession.

        The groups' row numbers and each fact are repeated. Without rows they stay None. Gates and all else stay as they
        are.
        """
        rows = self.rows
        if rows is not None:
            groups = {k: [row * copies + i for row in group for i in range(copies)] for k, group in rows.groups.items()}
            rows = Rows.from_groups(rows.batch * copies, groups, rows.order.device)
        facts = {k: v.repeat_interleave(copies, 0) for k, v in self.facts.items()} or NO_FACTS
        return self._replace(rows=rows, facts=facts)


NOTHING, ALL_OFF, AMBIGUOUS = CallContext(), CallContext(OFF), CallContext(UNCLEAR)


MAX_OBJECTS = 100_000  # objects of an output that `find_tensors` visits


def find_tensors(output: object) -> Iterator[Tensor]:
    """Yield the tensors in an output: in mappings' values, lists, tuples and sets, and in the attributes of objects
    such as dataclasses and caches. They come in no fixed order; attributes of a tensor are not searched.

    Modules, classes, strings, bytes, numbers and None are not searched. Each object is visited once, and at most
    100,000 are; the rest is passed over silently.
    """
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


Finish = Callable[[object], object]  # output of a run of the model → the output to return
SHIFTED = ("ForCausalLM", "ForConditionalGeneration")  # classes with a loss that leaves the first label of each row out


@dataclass
class Run:
    """One run of the model that is about to begin, for `Method.surround_run`, which may change `kwargs`."""

    inputs: tuple[object, ...]
    kwargs: dict[str, Any]
    graft_arguments: dict[str, object]  # arguments that are graft's and not the model's
    rows: Rows | None = None
    generates: bool = False  # the run is one of `generate`, which calls forward several times
    copies: int = 1  # copies of each row that `generate` makes
    adapters: Sequence[str] = ()  # the adapters that act and have the class of the `surround_run` that is called
    shares: Mapping[str, float] = field(default_factory=dict)  # adapter → its share of the batch's copies (1.0)

    def share(self, adapter: str, model: nn.Module) -> Tensor | float:
        """Return the weight of an adapter's own loss, which is a mean.

        The weight is the adapter's share of the batch's copies, 1.0 by default. If the call has `num_items_in_batch`
        and labels, that is multiplied by the number of labels (without -100) over `num_items_in_batch`, as Trainer sums
        such losses. The labels are `shift_labels` if the call has them, else `labels`; no tensor counts as none. If the
        model's `loss_type` is in `SHIFTED` and it is no encoder-decoder, the first of each row of `labels` does not
        count.
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
        """Return the argument `name` of the call; None if the call does not have it.

        The first that has it decides: graft's own arguments, the keyword arguments, the positional ones by the names in
        the model's forward.
        """
        if name in self.graft_arguments or name in self.kwargs:
            return self.graft_arguments.get(name, self.kwargs.get(name))
        place = list_forward_arguments(model).index(name) if name in list_forward_arguments(model) else len(self.inputs)
        return self.inputs[place] if place < len(self.inputs) else None

    def name_arguments(self, model: nn.Module) -> dict[str, Any]:
        """Return all arguments for the model's forward by name. Arguments that are graft's own are not among them."""
        return name_arguments(model, self.inputs, self.kwargs)

    def argument(self, name: str) -> Any:
        """Return the keyword argument `name`; None if it is missing.

        For "input_ids", if that is missing or None, returns the first positional argument.
        """
        value = self.kwargs.get(name)
        return self.inputs[0] if value is None and name == "input_ids" and self.inputs else value


def list_forward_arguments(model: nn.Module) -> list[str]:
    """Return the names of the arguments of a model's forward; of a model in torch.compile, those of the original."""
    return list(inspect.signature(getattr(model, "_orig_mod", model).forward).parameters)


def name_arguments(model: nn.Module, inputs: Sequence[object], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of a model's forward by name, positional ones included, in a new dict.

    A keyword wins over a positional argument of the same name.
    """
    return {**dict(zip(list_forward_arguments(model), inputs)), **kwargs} if inputs else dict(kwargs)


def count_copies(model: object, inputs: Sequence[object], kwargs: Mapping[str, Any]) -> int:
    """Return how often the model's `generate` repeats each row: the larger of num_beams and num_return_sequences.

    Each comes from `kwargs`, else from the generation config of the call (a keyword, or the first positional argument
    with `num_beams`), else from the model's. A value of None or 0 counts as not set; 1 if none sets it.
    """
    config = kwargs.get("generation_config") or next((value for value in inputs if hasattr(value, "num_beams")), None)
    configs = config, getattr(model, "generation_config", None)  # the model's config completes the caller's

    def setting(name: str) -> int:
        """Return the first value of `name` that is set and not 0, in that order; 1 if there is none."""
        values: list[int | None] = [kwargs.get(name), *(getattr(config, name, None) for config in configs)]
        return next((value for value in values if value), 1)

    return max(setting("num_beams"), setting("num_return_sequences"))


# caches of transformers

CACHES = ("cache", "past_key_values", "cache_params")  # the argument in transformers 5.24, before, and Mamba's before


def find_cache(arguments: Mapping[str, Any]) -> Any:
    """Return the first cache that is not None among named arguments, in the order of `CACHES`; None without one."""
    return next((arguments[name] for name in CACHES if arguments.get(name) is not None), None)


def count_cached_tokens(cache: Any) -> int | None:
    """Return the number of tokens that a cache has seen, `get_seq_length()` as an int.

    None if it has no such function, or if it has `layers` and none of these has one, as a cache of states alone
    (Mamba).
    """
    layers = getattr(cache, "layers", ())
    if not hasattr(cache, "get_seq_length") or (layers and not any(hasattr(n, "get_seq_length") for n in layers)):
        return None
    return int(cache.get_seq_length())


def is_stateful(cache: Any) -> bool:
    """Return True if a layer of the cache has a true `has_previous_state`, or a mapping there with a true value: the
    state of a Mamba.

    False for a cache without `layers`.
    """
    states = [getattr(layer, "has_previous_state", False) for layer in getattr(cache, "layers", ())]
    return any(any(state.values()) if isinstance(state, Mapping) else state for state in states)
