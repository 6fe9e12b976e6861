# SPDX-License-Identifier: Apache-2.0
"""Compositions: a Stack of adapters that act on each other's output, an Average, and a Parallel with a copy of the
batch for each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

from torch import Generator, Tensor, nn

from graft.config.base import PeftConfig
from graft.core.call import Call, in_this_thread
from graft.core.errors import RoutingError
from graft.core.finite import is_finite
from graft.core.method import Tuner
from graft.core.random import AdapterGenerators, GeneratorSnapshot
from graft.core.rows import BASE, CallContext, JointAdapters, Rows, find_tensors

T = TypeVar("T")
SHARED = ("cache_position",)  # arguments that all rows share, whatever their shape
MAIN = ("input_ids", "inputs_embeds", "pixel_values")  # others, such as positions, may be one for all rows
ITEMS = "num_items_in_batch"  # tokens of an optimizer step, multiplied by the copies: a loss is divided by it
NESTED = {  # remedies, by the outer composition and the inner one
    ("Stack", "Average"): "If its adapters have a ΔW, add_weighted_adapter makes one of them, which the Stack can name",
    ("Stack", "Stack"): "Name the adapters of both in one Stack, in their order",
    ("Parallel", "Parallel"): "Name the children of both in one Parallel",
}


class Composition:
    """Base of the values that `set_adapter` and `compose=` take.

    Equal if class, children and weights are equal; hashable.
    """

    children: tuple[Any, ...]

    def __init__(self, *children: object):
        """Check and keep the children. Raises RoutingError without children, and as `_check`."""
        self.children = children
        if not children:
            raise RoutingError(f"{self._name} of no adapters: name one at least.")
        for child in children:
            self._check(child)

    @property
    def _name(self) -> str:
        """The name of the class, for errors."""
        return type(self).__name__

    def _check(self, child: object) -> None:
        """Raise RoutingError for a child that cannot be in this composition.

        These are, in this order: any composition, with the remedy for the pair of classes; anything but a text; the
        base ("__base__"); a name that is in `children` twice.
        """
        if isinstance(child, Composition):
            remedy = NESTED.get(
                (self._name, child._name), f"Name its adapters in the {self._name}, or call with it alone"
            )
            raise RoutingError(
                f"{self._name} takes names of adapters, and {child!r} is a composition: only a Parallel can contain a "
                f"Stack or an Average. {remedy}."
            )
        if not isinstance(child, str):
            raise RoutingError(f"{self._name} takes names of adapters, got {child!r}.")
        if child == BASE:
            raise RoutingError(f"{self._name} takes adapters, and '{BASE}' means a row without one. Leave it out.")
        if self.children.count(child) > 1:
            raise RoutingError(f"{self._name} names adapter '{child}' twice: it acts once.")

    @property
    def names(self) -> list[str]:
        """The names of the adapters, each once."""
        return list(dict.fromkeys(name for child in self.children for name in adapters_in(child)))

    def __repr__(self) -> str:
        """Return "Stack('a', 'b')"."""
        return f"{self._name}({', '.join(map(repr, self.children))})"

    def __eq__(self, other: object) -> bool:
        """Return True for a composition of the same class with equal children and weights."""
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        """Return a hash of the class and the children."""
        return hash((type(self), self.children))


class Stack(Composition):
    """Adapters in a chain: each acts on the layer that the ones before it made. `set_adapter([...])` as a value.

    Raises:
        RoutingError: there are no children, one is there twice, or one is no name.
    """


class Average(Composition):
    """Adapters with weights: y + Σ wᵢ uᵢ(y). Each update uᵢ sees the base's output y, not the others'.

    Args:
        weights: one for each adapter; 1/n each if None.

    Raises:
        RoutingError: there are no children, one is there twice or is no name, or the weights are not one finite number
            each.
    """

    def __init__(self, *children: str, weights: Sequence[float] | None = None):
        """Check the children, and set `weights` to a tuple of floats; 1/n each if None.

        Raises:
            RoutingError: children are wrong (as for the class), or the weights are not one finite int or float for
                each. A bool is refused; negative weights and any sum pass.
        """
        super().__init__(*children)
        numbers = [1 / len(children)] * len(children) if weights is None else list(weights)
        if len(numbers) != len(children):
            raise RoutingError(f"Average of {len(children)} adapters got {len(numbers)} weights: give one for each.")
        wrong = [w for w in numbers if isinstance(w, bool) or not isinstance(w, (int, float)) or not is_finite(w)]
        if wrong:
            raise RoutingError(f"Average takes finite numbers as weights, got {wrong[0]!r}.")
        self.weights = tuple(float(w) for w in numbers)

    def __repr__(self) -> str:
        """Return "Average('a', 'b', weights=[0.5, 0.5])"."""
        return f"{super().__repr__()[:-1]}, weights={list(self.weights)})"


class Parallel(Composition):
    """Adapters, Stacks and Averages that each run on a copy of the batch.

    The copies follow each other: rows of the first child first.

    `graft.split` cuts the output. A loss is the mean over the copies, and so are the losses that adapters add. A
    Parallel cannot be merged.

    Raises:
        RoutingError: there are no children, or one is none of these.
    """

    def _check(self, child: object) -> None:
        """Accept a Stack or an Average; else raise RoutingError as for a Stack's child."""
        if not isinstance(child, (Stack, Average)):
            super()._check(child)


def adapters_in(value: str | Composition) -> list[str]:
    """Return the adapters of a child: [the name], or those of a composition."""
    return [value] if isinstance(value, str) else value.names


def row_keys(value: str | Composition) -> list[str | JointAdapters]:
    """Return the key of each copy of a row, which layers use to select adapters: one, or of a Parallel one for each
    child.

    A key is an adapter's name, or a `JointAdapters`: of an Average, with its weights, even for one adapter; and of a
    Stack of several. A Stack of one adapter is that name.
    """
    if isinstance(value, Parallel):
        return [key for child in value.children for key in row_keys(child)]
    if isinstance(value, Average):
        return [JointAdapters(value.children, value.weights)]
    if isinstance(value, Stack) and len(value.children) > 1:
        return [JointAdapters(value.children)]
    return [*adapters_in(value)]


def copy_shares(value: Composition | None) -> dict[str, float]:
    """Return for each adapter of a Parallel the share (0 to 1) of its children that contain the adapter; {} for other
    values and None.
    """
    if not isinstance(value, Parallel):
        return {}
    children = [adapters_in(child) for child in value.children]
    return {name: sum(name in child for child in children) / len(children) for name in value.names}


def check_known(names: Sequence[str], configs: Mapping[str, PeftConfig], value: Composition) -> None:
    """Raise RoutingError if a name is not in `configs`, or is a prompt, which cannot be part of a composition.

    The text has `value` and all such names, unknown ones sorted. Unknown names are an error before prompts.
    """
    unknown = sorted({name for name in names if name not in configs})
    if unknown:
        raise RoutingError(f"{value!r} names {unknown}, which are not loaded. Loaded: {', '.join(configs) or 'none'}.")
    prompts = [name for name in names if configs[name].is_prompt_learning]
    if prompts:
        raise RoutingError(f"{value!r} names prompts {prompts}. One prompt acts at a time: call set_adapter(name).")


def count_rows(inputs: Sequence[object], kwargs: Mapping[str, object]) -> int:
    """Return the number of rows of a batch: the length of the first positional tensor, else of `input_ids`,
    `inputs_embeds` or `pixel_values`, else of any keyword.

    Tensors without dimensions do not count. Raises RoutingError if no argument is a tensor with dimensions.
    """
    for value in (*inputs, *(kwargs.get(name) for name in MAIN), *kwargs.values()):
        if isinstance(value, Tensor) and value.dim():
            return len(value)
    raise RoutingError("The call has no tensor that tells its number of rows. Pass one with a composition.")


def copy_rows(
    batch: int, inputs: tuple[object, ...], kwargs: Mapping[str, object], copies: int, own_arguments: Collection[str]
) -> tuple[tuple[object, ...], dict[str, Any]]:
    """Return positional arguments as a tuple and keyword arguments as a dict (or facts about rows) for `copies`
    batches, one after the other.

    With one copy, return them unchanged, `kwargs` as a new dict.

    Tensors with `batch` rows are repeated, also within plain lists, tuples and dicts; `cache_position` and other
    tensors and values stay. `num_items_in_batch` is multiplied by the copies.

    Args:
        own_arguments: names of arguments of graft and its methods: their lists and tuples with `batch` items are
            repeated.

    Raises:
        RoutingError: an argument holds tensors in an object of another kind, such as a filled cache.
    """
    if copies == 1:
        return inputs, dict(kwargs)

    def copy_value(value: Any, name: str) -> object:
        """Return the value of argument `name` for all copies.

        An int or tensor `num_items_in_batch` is multiplied by the copies. A tensor with `batch` rows is repeated,
        except `cache_position`; other tensors stay. A list or tuple with `batch` items is repeated for an own argument;
        any other plain list, tuple or dict is rebuilt with its items' copies, under the same `name`. Other values stay.
        Raises RoutingError for another object that contains tensors with dimensions.
        """
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
                f"Parallel cannot copy the rows in argument '{name}', a {type(value).__name__} that holds tensors. "
                "Leave it out, or run the adapters one by one."
            )
        return value

    positional = tuple(copy_value(value, f"number {i}") for i, value in enumerate(inputs))
    return positional, {name: copy_value(value, name) for name, value in kwargs.items()}


def split(output: T, n: int) -> list[T]:
    """Cut the output of a call with `Parallel` into those of its n children, in order.

    A loss and other tensors without dimensions are in each part unchanged. A cache becomes None, or is left out of
    transformers' outputs.

    Args:
        output: a tensor, or tensors in tuples, lists, dicts and transformers' outputs; rows come first.

    Raises:
        RoutingError: n is no positive int, or the rows of a tensor are not n copies.
    """
    if not isinstance(n, int) or n < 1:
        raise RoutingError(f"split takes the number of parts, got {n!r}.")
    return [_cut_part(output, n, i) for i in range(n)]


def _cut_part(value: object, n: int, i: int) -> Any:
    """Return part i of n of a value, for `split`.

    A tensor gives its i-th n-th of the rows, as a view, or itself without dimensions. Mappings, named tuples, tuples
    and lists are rebuilt in their class with the parts of their items. A mapping that is no plain dict loses items that
    become None. Another object that contains tensors becomes None; other values stay. Raises RoutingError if rows are
    no multiple of n.
    """
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


# the rows of a mixed batch, from `adapter_names`, `compose` and `adapter_generators`, and their copies in `generate`


RowNames = list[str | Composition] | None  # the adapter or composition of each row


def check_row_names(names: Iterable[str | Composition] | None) -> RowNames:
    """Return `adapter_names`, any iterable, as a list; None unchanged. Whether the names are loaded is not checked.

    Raises:
        TypeError: it is one string, or an entry is neither a name nor a composition (None is neither).
        RoutingError: an entry is a Parallel.
    """
    if names is None:
        return None
    if isinstance(names, str):
        raise TypeError(
            f"adapter_names takes one name per row of the batch, got the string {names!r}: pass ['{names}', …], or "
            f"set_adapter('{names}') for all rows."
        )
    names = list(names)
    wrong = {row: name for row, name in enumerate(names) if not isinstance(name, (str, Composition))}
    if wrong:
        raise TypeError(f"adapter_names takes names, got {wrong} (by row). For a row without an adapter pass '{BASE}'.")
    if any(isinstance(name, Parallel) for name in names):
        raise RoutingError("adapter_names has a Parallel, which copies rows: pass it as compose=.")
    return names


def make_rows(registry: Tuner, names: RowNames, inputs: tuple[object, ...], kwargs: dict[str, object]) -> Rows | None:
    """Return the rows of a mixed batch; None if `names` is None.

    A composition's row has the key of its joint adapters. The index tensors are on the device of the first tensor
    argument, or the default without one. The number of names must be that of the rows of some tensor argument, times
    the call's copies; without tensors it is not checked.

    Raises:
        RoutingError: an adapter is not loaded (the base's name is allowed), any adapter is merged, no tensor has that
            many rows, or a composition is not allowed.
        ValueError: adapters of a composition cannot act together.
    """
    if names is None:
        return None
    for value in {name for name in names if isinstance(name, Composition)}:
        registry.check_composition(value)
    unknown = sorted({n for n in names if isinstance(n, str) and n != BASE and n not in registry.peft_config})
    if unknown:
        loaded = ", ".join(registry.peft_config)
        raise RoutingError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. Loaded: {loaded}.")
    merged = registry.merged_adapters
    if merged:
        raise RoutingError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first. "
            f"Merged: {merged}."
        )
    tensors = [t for t in (*inputs, *kwargs.values()) if isinstance(t, Tensor)]
    rows = [len(t) * registry.call.context.copies for t in tensors if t.dim()]
    if rows and len(names) not in rows:  # samples may share a tensor, or have several rows in one: layers check
        raise RoutingError(
            "Length of `adapter_names` should be the same as the number of inputs, "
            f"but got {len(names)} and {Counter(rows).most_common(1)[0][0]} respectively."
        )
    keys = {name: row_keys(name)[0] for name in set(names)}
    return Rows.from_names([keys[name] for name in names], tensors[0].device if tensors else None)


def choose_composition(registry: Tuner, value: Composition | None, names: object) -> Composition | None:
    """Return the composition for a call: `value`, its argument `compose`; else the active Parallel, or None.

    An active Parallel does not count if rows have names or adapters are disabled. An active Stack or Average gives
    None: the layers apply it.

    Raises:
        TypeError: `value` is no composition.
        RoutingError: the call has both `compose` and `adapter_names`.
    """
    if value is None:
        active = registry.composition
        return active if isinstance(active, Parallel) and names is None and not registry.is_disabled else None
    if not isinstance(value, Composition):
        raise TypeError(f"compose takes a Stack, an Average or a Parallel, got {value!r}.")
    if names is not None:
        raise RoutingError("compose is for all rows of a call, adapter_names for each: pass one of them.")
    return value


def copy_batch(
    call: Call, value: Composition, inputs: tuple[object, ...], kwargs: dict[str, object], own_arguments: set[str]
) -> tuple[tuple[object, ...], dict[str, object], list[str | Composition], AbstractContextManager[None]]:
    """Return the positional and keyword arguments of a call for a composition, the entry of each row, and a context
    with the facts about rows.

    Of a Parallel all are copied, once for each child; other compositions have one copy. `own_arguments` are arguments
    of graft and its methods.
    """
    batch, children = count_rows(inputs, kwargs), value.children if isinstance(value, Parallel) else (value,)
    inputs, kwargs = copy_rows(batch, inputs, kwargs, len(children), own_arguments)
    _, facts = copy_rows(batch, (), call.context.facts, len(children), own_arguments)
    return inputs, kwargs, [child for child in children for _ in range(batch)], call.extend_context(facts=facts)


def make_draws(generators: object, rows: Rows | None) -> AdapterGenerators | None:
    """Return the random generators of a call by adapter, from `adapter_generators`; None without them.

    Generators of adapters that no row names are left out; a row of None needs none.

    Raises:
        RoutingError: the call has no names of rows, a row has a Stack or an Average, an adapter has no generator, or
            two of the batch share one.
        TypeError: it is no mapping, or a value of any adapter is no torch.Generator of the CPU.
    """
    if generators is None:
        return None
    if rows is None:
        raise RoutingError(
            "adapter_generators need adapter_names. Pass one name per row of the batch, also if all rows use one "
            "adapter; or leave them out and seed torch's generator (torch.manual_seed), which all adapters share."
        )
    if not isinstance(generators, Mapping):
        raise TypeError(f"adapter_generators takes a torch.Generator by adapter, got a {type(generators).__name__}.")
    wrong = {n: g for n, g in generators.items() if not isinstance(g, Generator) or g.device.type != "cpu"}
    if wrong:
        raise TypeError(f"adapter_generators takes generators of the CPU (torch.Generator()), got {wrong}.")
    if any(isinstance(key, JointAdapters) for key in rows.keys):
        raise RoutingError("adapter_generators are for rows of one adapter each, not for a Stack or an Average.")
    names = {name for name in rows.names if name is not None}
    if missing := sorted(names - set(generators)):
        raise RoutingError(f"adapter_generators has none for {missing}: give each adapter of the batch one.")
    if len({id(generators[name]) for name in names}) < len(names):
        raise RoutingError(f"Adapters {sorted(names)} share a generator. Give each a separate one.")
    return AdapterGenerators({name: generators[name] for name in rows.names if name is not None})


@contextmanager
def forbid_shared_draws(draws: AdapterGenerators) -> Iterator[None]:
    """Raise RoutingError after the block if it drew from torch's own generators, which all adapters share.

    On any error the adapters' generators return to their states from before the block.
    """
    before = GeneratorSnapshot()
    try:
        yield
        if not before.is_untouched():
            raise RoutingError(
                "The base model drew random numbers for the whole batch, so each adapter's result depends on the "
                "others. Set its dropout to 0 (attention_dropout, …), or leave out adapter_generators."
            )
    except BaseException:
        draws.rewind()
        raise


@contextmanager
def use_copies(call: Call, copies: int, model: nn.Module) -> Iterator[None]:
    """Within the block, replace the thread's call context by its `repeat(copies)`, as `generate` repeats rows.

    At the end the former context is set again.

    The encoder of an encoder-decoder model runs before the copies are made: two hooks give it, in this thread, the
    former context itself. This holds for one copy, too. The second hook does not run if the encoder raises.
    """
    once = call.context
    copied = once.repeat(copies)
    with ExitStack() as undo:
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            encoder = model.get_encoder()

            def put_context(context: CallContext) -> None:
                """Set the call context; return None, as a hook that changes nothing has to."""
                call.swap_context(context)

            undo.enter_context(encoder.register_forward_pre_hook(in_this_thread(lambda *_: put_context(once))))
            undo.enter_context(encoder.register_forward_hook(in_this_thread(lambda *_: put_context(copied))))
        undo.enter_context(call.use_context(copied))
        yield
