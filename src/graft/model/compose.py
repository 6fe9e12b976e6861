# SPDX-License-Identifier: Apache-2.0
"""Composition: adapters that act on each other's output, as an average, or each on a copy of the batch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from graft.config.base import PeftConfig
from graft.core.errors import RoutingError
from graft.core.finite import is_finite
from graft.core.rows import BASE, JointAdapters, find_tensors

T = TypeVar("T")
SHARED = ("cache_position",)  # arguments of models that no row has for itself
MAIN = ("input_ids", "inputs_embeds", "pixel_values")  # others, such as positions, may be one for all rows
ITEMS = "num_items_in_batch"  # tokens of an optimizer step, of which a loss is the mean: each has its copies
NESTED = {  # remedies, by the outer composition and the inner one
    ("Stack", "Average"): "If its adapters have a ΔW, add_weighted_adapter makes one of them, which the Stack can name",
    ("Stack", "Stack"): "Name the adapters of both in one Stack, in their order",
    ("Parallel", "Parallel"): "Name the children of both in one Parallel",
}


class Composition:
    """Base of the values that `set_adapter` and `compose=` take."""

    children: tuple[Any, ...]

    def __init__(self, *children: object):
        self.children = children
        if not children:
            raise RoutingError(f"{self._name} of no adapters: name one at least.")
        for child in children:
            self._check(child)

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _check(self, child: object) -> None:
        if isinstance(child, Composition):
            remedy = NESTED.get(
                (self._name, child._name), f"Name its adapters in the {self._name}, or call with it alone"
            )
            raise RoutingError(
                f"{self._name} takes names of adapters, and {child!r} is a composition: only a Parallel has a Stack or "
                f"an Average within. {remedy}."
            )
        if not isinstance(child, str):
            raise RoutingError(f"{self._name} takes names of adapters, got {child!r}.")
        if child == BASE:
            raise RoutingError(f"{self._name} takes adapters, and '{BASE}' stands for a row without one.")
        if self.children.count(child) > 1:
            raise RoutingError(f"{self._name} names adapter '{child}' twice: it acts once.")

    @property
    def names(self) -> list[str]:
        """The adapters, each once."""
        return list(dict.fromkeys(self.children))

    def __repr__(self) -> str:
        return f"{self._name}({', '.join(map(repr, self.children))})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((type(self), self.children))


class Stack(Composition):
    """Adapters each of which acts on the layer that those before it made: `set_adapter([...])` as a value.

    Raises:
        RoutingError: no adapters, one twice, or what is no name.
    """


class Average(Composition):
    """Adapters whose parts count by their weights: y + Σ wᵢ uᵢ(y), all from one output y.

    Args:
        weights: one for each adapter; 1/n each if None.

    Raises:
        RoutingError: no adapters, one twice, what is no name, or other than one finite weight for each.
    """

    def __init__(self, *children: str, weights: Sequence[float] | None = None):
        super().__init__(*children)
        numbers = [1 / len(children)] * len(children) if weights is None else list(weights)
        if len(numbers) != len(children):
            raise RoutingError(f"Average of {len(children)} adapters got {len(numbers)} weights: give one for each.")
        wrong = [w for w in numbers if isinstance(w, bool) or not isinstance(w, (int, float)) or not is_finite(w)]
        if wrong:
            raise RoutingError(f"Average takes finite numbers as weights, got {wrong[0]!r}.")
        self.weights = tuple(float(w) for w in numbers)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, weights={list(self.weights)})"


class Parallel(Composition):
    """Adapters, Stacks and Averages, each of which gets a copy of the batch: rows of the first come first.

    `graft.split` cuts the output. A loss is the mean over the copies, those that adapters add with it. It cannot merge.

    Raises:
        RoutingError: no children, or one that is none of these.
    """

    def _check(self, child: object) -> None:
        if not isinstance(child, (Stack, Average)):
            super()._check(child)

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(name for child in self.children for name in adapters_in(child)))


def adapters_in(value: str | Composition) -> list[str]:
    return [value] if isinstance(value, str) else value.names


def row_keys(value: str | Composition) -> list[str | JointAdapters]:
    """Return what each copy of a row uses: one key, or of a Parallel one for each child."""
    if isinstance(value, Parallel):
        return [key for child in value.children for key in row_keys(child)]
    if isinstance(value, Average):
        return [JointAdapters(value.children, value.weights)]
    if isinstance(value, Stack) and len(value.children) > 1:
        return [JointAdapters(value.children)]
    return [*adapters_in(value)]


def copy_shares(value: Composition | None) -> dict[str, float]:
    """Return the share of a batch's copies on which each adapter of a Parallel acts; {} for other values."""
    if not isinstance(value, Parallel):
        return {}
    children = [adapters_in(child) for child in value.children]
    return {name: sum(name in child for child in children) / len(children) for name in value.names}


def check_known(names: Sequence[str], configs: Mapping[str, PeftConfig], value: Composition) -> None:
    """Raise RoutingError unless there are such adapters, on layers."""
    unknown = sorted({name for name in names if name not in configs})
    if unknown:
        raise RoutingError(f"{value!r} names {unknown}, which are not loaded. Loaded: {', '.join(configs) or 'none'}.")
    prompts = [name for name in names if configs[name].is_prompt_learning]
    if prompts:
        raise RoutingError(f"{value!r} names prompts {prompts}, of which one acts at a time: set_adapter(name).")


def count_rows(inputs: Sequence[object], kwargs: Mapping[str, object]) -> int:
    """Return the number of rows: those of the tokens or images, if named, else of the first tensor argument."""
    for value in (*inputs, *(kwargs.get(name) for name in MAIN), *kwargs.values()):
        if isinstance(value, Tensor) and value.dim():
            return len(value)
    raise RoutingError("A composition for one call needs a tensor among the arguments, which tells the rows.")


def copy_rows(
    batch: int, inputs: tuple[object, ...], kwargs: Mapping[str, object], copies: int, own_arguments: Collection[str]
) -> tuple[tuple[object, ...], dict[str, Any]]:
    """Return arguments, or facts, of a batch of `batch` rows for `copies` such batches, one after the other.

    own: arguments of graft and its methods, whose lists and tuples have an item for each row.

    Raises:
        RoutingError: an argument holds tensors of the rows in an object of another kind, such as a filled cache.
    """
    if copies == 1:
        return inputs, dict(kwargs)

    def copy_value(value: Any, name: str) -> object:
        if name == ITEMS and isinstance(value, (int, Tensor)):
            return value * copies
        if isinstance(value, Tensor):
            has_rows = value.dim() and len(value) == batch and name not in SHARED
            return value.repeat(copies, *[1] * (value.dim() - 1)) if has_rows else value
        if name in own_arguments and isinstance(value, (list, tuple)) and len(value) == batch:
            return value * copies
        if type(value) in (list, tuple):
            return type(value)(copy_value(item, name) for item in value)
        if type(value) is dict:
            return {key: copy_value(item, name) for key, item in value.items()}
        if any(t.dim() for t in find_tensors(value)):
            raise RoutingError(
                f"Parallel copies the rows of tensors, and argument '{name}' is a {type(value).__name__} that holds "
                "tensors: leave it out, or run the adapters one by one."
            )
        return value

    return (
        tuple(copy_value(value, f"number {i}") for i, value in enumerate(inputs)),
        {name: copy_value(value, name) for name, value in kwargs.items()},
    )


def split(output: T, n: int) -> list[T]:
    """Cut the output of a call with `Parallel` into those of its n children.

    A loss and other tensors without rows are in each part as they are. Caches are in none: None stands there.

    Args:
        output: a tensor, or tensors in tuples, lists, dicts and transformers' outputs; rows come first.

    Raises:
        RoutingError: the rows of a tensor are not n copies.
    """
    if not isinstance(n, int) or n < 1:
        raise RoutingError(f"split takes the number of parts, got {n!r}.")
    return [_cut_part(output, n, i) for i in range(n)]


def _cut_part(value: object, n: int, i: int) -> Any:
    if isinstance(value, Tensor):
        if not value.dim():
            return value
        if len(value) % n:
            raise RoutingError(f"split cannot cut {len(value)} rows into {n} equal parts.")
        size = len(value) // n
        return value[i * size : (i + 1) * size]
    if isinstance(value, Mapping):
        items = {key: _cut_part(item, n, i) for key, item in value.items()}
        fields = items if type(value) is dict else {key: item for key, item in items.items() if item is not None}
        return fields if type(value) is dict else type(value)(**fields)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_cut_part(item, n, i) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_cut_part(item, n, i) for item in value)
    return None if any(True for _ in find_tensors(value)) else value
