# SPDX-License-Identifier: Apache-2.0
"""The rows of a mixed batch, from the arguments `adapter_names`, `compose` and `adapter_generators`, and their copies
in `generate`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from threading import get_ident

from torch import Generator, Tensor, nn

from graft.core.call import Call
from graft.core.errors import RoutingError
from graft.core.random import AdapterGenerators, GeneratorSnapshot
from graft.core.rows import BASE, CallContext, JointAdapters, Rows
from graft.model.compose import Composition, Parallel, copy_rows, count_rows, row_keys
from graft.model.registry import Registry

RowNames = list[str | Composition] | None  # the adapter or composition of each row


def check_row_names(names: Iterable[str | Composition] | None) -> RowNames:
    """Return `adapter_names` as a list; None unchanged. Loaded or not is not checked.

    Raises:
        TypeError: it is one string, or an entry is neither a name nor a composition.
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


def make_rows(
    registry: Registry, names: RowNames, inputs: tuple[object, ...], kwargs: dict[str, object]
) -> Rows | None:
    """Return the rows of a mixed batch; None if `names` is None.

    The index tensors are on the first tensor argument's device.

    Raises:
        RoutingError: an adapter is not loaded, adapters are merged, no tensor has that many rows, or a composition is
            not allowed.
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


def choose_composition(registry: Registry, value: Composition | None, names: object) -> Composition | None:
    """Return the composition for a call: `value`, its argument `compose`; else an active Parallel, unless rows have
    names or adapters are disabled; else None.

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

    Raises:
        RoutingError: the call has no names of rows, a row has a Stack or an Average, an adapter has no generator, or
            two share one.
        TypeError: it is no mapping of names to torch.Generators of the CPU.
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
    if names - set(generators):
        raise RoutingError(
            f"adapter_generators has none for {sorted(names - set(generators))}: give each adapter of the batch one."
        )
    if len({id(generators[name]) for name in names}) < len(names):
        raise RoutingError(
            f"Adapters {sorted(names)} share a generator, so each one's random numbers would depend on the others. "
            "Give each a separate one."
        )
    return AdapterGenerators({name: generators[name] for name in rows.names if name is not None})


def forbid_shared_draws(draws: AdapterGenerators | None) -> AbstractContextManager[None]:
    """Return a context that raises RoutingError if its block draws from torch's own generators; one that does nothing
    without `draws`.
    """
    return nullcontext() if draws is None else _forbid_shared_draws(draws)


@contextmanager
def _forbid_shared_draws(draws: AdapterGenerators) -> Iterator[None]:
    """Raise RoutingError after the block if it drew from torch's own generators, which all adapters share.

    On any error the adapters' generators return to their states from before the block.
    """
    before = GeneratorSnapshot()
    try:
        yield
        if not before.is_untouched():
            raise RoutingError(
                "The base model drew random numbers for the whole batch, so each adapter's result depends on the "
                "others. Set the base's dropout to 0 (attention_dropout, hidden_dropout_prob, …), or leave out "
                "adapter_generators."
            )
    except BaseException:
        draws.rewind()
        raise


@contextmanager
def use_copies(call: Call, copies: int, model: nn.Module) -> Iterator[None]:
    """Within the block, set the thread's call context to one with `copies` of each row, as `generate` repeats rows.

    The encoder of an encoder-decoder model runs before the copies are made: hooks give it, in this thread, the context
    without copies. This holds for one copy, too. The second hook does not run if the encoder raises.
    """
    once = call.context
    copied = once.repeat(copies)
    with ExitStack() as undo:
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            encoder, thread = model.get_encoder(), get_ident()

            def put_context(context: CallContext) -> None:
                """Set the call context, if this is the thread that entered the block."""
                if get_ident() == thread:  # other threads may run the encoder as well
                    call.swap_context(context)

            undo.enter_context(encoder.register_forward_pre_hook(lambda *_: put_context(once)))
            undo.enter_context(encoder.register_forward_hook(lambda *_: put_context(copied)))
        undo.callback(call.swap_context, once)
        call.swap_context(copied)
        yield
