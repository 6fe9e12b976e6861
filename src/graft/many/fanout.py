# SPDX-License-Identifier: Apache-2.0
"""Runs that see the same batch share the blocks of the base before the first adapted one: these blocks run once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def repeat_inputs(blocks: Sequence[nn.Module], rows: int, copies: int) -> Iterator[None]:
    """Within the block, repeat the inputs of these blocks `copies` times: tensors of two or more dimensions and `rows`
    rows, see `repeat_rows`. Without blocks nothing happens.

    A pre-forward hook, before all others, does so in this thread and in backward passes of any thread. It is removed at
    the end, also after an error.
    """
    thread = get_ident()

    def repeat(
        _: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[object, dict[str, object]] | None:
        """Return the block's arguments with repeated rows.

        Return None, which leaves them unchanged, in another thread outside a backward pass.
        """
        if get_ident() != thread and torch._C._current_graph_task_id() == -1:
            return None
        return repeat_rows(args, rows, copies), repeat_rows(kwargs, rows, copies)

    with ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(block.register_forward_pre_hook(repeat, prepend=True, with_kwargs=True))
        yield


def repeat_rows(value: Any, rows: int, copies: int) -> Any:
    """Return a value with tensors of `rows` rows and two or more dimensions repeated `copies` times along the first,
    all rows after all rows.

    Tuples, lists and dicts of exactly these types are rebuilt, recursively. All else is returned as it is, such as
    vectors and named tuples.
    """
    if isinstance(value, Tensor):  # a vector has no rows: places in a cache
        return value.repeat(copies, *[1] * (value.dim() - 1)) if value.dim() > 1 and len(value) == rows else value
    if type(value) in (tuple, list):
        return type(value)(repeat_rows(v, rows, copies) for v in value)
    if type(value) is dict:
        return {k: repeat_rows(v, rows, copies) for k, v in value.items()}
    return value


def find_fan(base: nn.Module, hosts: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the blocks from the first one with a host to the end of their list; [] if rows cannot be repeated there.

    Blocks are the items of the model's only outermost ModuleList. The result is [] without such a list or with
    several, without a host, or with a host that is not in the base. It is [] also if the first host in the model's
    order comes before the list, or the first block has a host, since nothing would be saved.
    """
    host_ids, names = {id(host) for host in hosts}, dict(base.named_modules())
    places = [key for key, m in names.items() if id(m) in host_ids]
    lists = [key for key, m in names.items() if isinstance(m, nn.ModuleList)]
    outer = [key for key in lists if not any(key.startswith(f"{outer_key}.") for outer_key in lists)]
    if len(outer) != 1 or len(places) != len(host_ids):
        return []
    within = f"{outer[0]}."
    if not places or not places[0].startswith(within):
        return []
    first = min(int(key.removeprefix(within).split(".")[0]) for key in places if key.startswith(within))
    blocks: Any = names[outer[0]]
    return list(blocks)[first:] if first else []


def are_batches_equal(batches: Sequence[Mapping[str, object]]) -> bool:
    """Return True if all batches have the same keys and values, as `is_same_value` compares them."""
    first, *later = batches
    return all(b.keys() == first.keys() and all(is_same_value(v, first[k]) for k, v in b.items()) for b in later)


def is_same_value(a: object, b: object) -> bool:
    """Return True for one tensor object, or CPU tensors of equal dtype and values.

    Two tensors on a device count as different, which avoids waiting for it. Other values need equal type and value.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.is_cpu and b.is_cpu and a.dtype == b.dtype and torch.equal(a, b))
    return type(a) is type(b) and bool(a == b)
