# SPDX-License-Identifier: Apache-2.0
# Supported inside: rooms may import this module.
"""Meetings of all processes: a step that needs them all begins once all have come, and ends alike for all.

A process in a collective waits for ever if others do not come. So they meet in the store of the process group first,
where one that is alone gets an error after 30 seconds (`GRAFT_PATIENCE`).

A save compares the processes' arguments at the meeting, then gathers the tensors in order of their names, and the first
process writes while the others wait for its result. An error of one process is raised on all.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable
from datetime import timedelta
from itertools import groupby
from operator import attrgetter
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from graft.core.errors import CheckpointError, DistributedError
from graft.inject.build import make_spare_layer
from graft.inject.parts import AdapterCarriers
from graft.inject.stage import attempt
from graft.io.entries import Entry
from graft.io.fingerprint import hash_text
from graft.storage.meeting import PATIENCE, get_store, leave_error, pickle_error
from graft.storage.meeting import Meeting as Meeting
from graft.storage.parallel import find_whole_shape, gather_tensor, is_whole, layout_of, processes

T = TypeVar("T")
CALL = "save_pretrained()"
GATHER = (
    "Gather the whole tensors on all processes (as torch.distributed.checkpoint.state_dict.get_model_state_dict does, "
    "or accelerate's get_state_dict) and pass them as save_pretrained(…, state_dict=…)."
)


def gather_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the sharded ones among these tensors, sorted by name, gathered whole; {} if there is none.

    All processes must call this. They wait for each other only if a tensor is sharded over several, and compare names,
    shapes and dtypes first.

    Raises:
        CheckpointError: a process is alone, or others have other tensors.
    """
    spread = {name: t for name, t in tensors.items() if layout_of(t) is not None}
    spread = {name: spread[name] for name in sorted(spread)}  # in one order everywhere
    ranks = find_ranks(spread.values())
    if len(ranks) > 1:
        shapes = [f"{name} {tuple(find_whole_shape(t))} {t.dtype}" for name, t in spread.items()]
        Meeting(CALL, f"{len(shapes)} tensors ({hash_text(' '.join(shapes))}) such as {shapes[0]}", ranks)
    return {name: gather_tensor(t) for name, t in spread.items()}


def find_ranks(tensors: Iterable[Tensor]) -> list[int]:
    """Return the ranks of the processes that hold these tensors together: the longest list of one tensor; [] if none is
    sharded.
    """
    rank_lists = [layout.ranks(t) for t in tensors if (layout := layout_of(t)) is not None]
    return max(rank_lists, key=len, default=[])


def check_entries(entries: list[Entry], values: dict[str, Tensor], parts: AdapterCarriers, adapter: str) -> None:
    """Compare the shapes of values to be saved, by file key, with those of the adapter.

    An entry of a layer may be an empty placeholder, or have another shape than its value. Then the config gives the
    shape, by a spare layer on the meta device. Of a sharded entry the whole shape counts.

    Raises:
        CheckpointError: a value has another shape than the adapter's tensor.
    """
    suspects = [
        e
        for e in entries
        if values[e.file].shape != find_whole_shape(e.tensor)
        or (layout_of(e.tensor) is None and not is_whole(e.tensor))
    ]
    for layer, group in groupby(suspects, attrgetter("layer")):
        slots = [] if layer is None else make_spare_layer(layer, parts, adapter, on_meta=True).slots(adapter)
        shapes = {(slot.container, slot.path): slot.tensor.shape for slot in slots}
        for e in group:
            check_value(e.memory, values[e.file], e.tensor, adapter, shapes.get((e.container, e.path)))


def check_value(key: str, value: Tensor, tensor: Tensor, adapter: str, shape: torch.Size | None = None) -> None:
    """Raise CheckpointError if `value` has another shape than `shape`.

    If that is None it is the whole shape of `tensor`. If `tensor` is an empty placeholder then, any value with numbers
    passes, and an empty one raises.
    """
    if shape is None and (layout_of(tensor) is not None or is_whole(tensor)):
        shape = find_whole_shape(tensor)
    if value.shape == shape or (shape is None and value.numel()):
        return
    wanted = "" if shape is None else f" and not {tuple(shape)}"
    raise CheckpointError(
        f"'{key}' of adapter '{adapter}' has the shape {tuple(value.shape)}{wanted}: it is a part of the tensor, or "
        f"an empty placeholder. {GATHER}"
    )


def get_rank() -> int:
    """Return this process's rank; 0 for a single process."""
    return dist.get_rank() if processes() > 1 else 0


def exchange_objects(thing: T) -> list[T]:
    """Return every process's `thing`, pickled on the way, by rank.

    Every process must call this; a single one gets [thing].
    """
    if processes() == 1:
        return [thing]
    values = [thing] * processes()
    dist.all_gather_object(values, thing)
    return values


def run_on_all(act: Callable[[], T], call: str) -> T:
    """Call `act`, which must change nothing, and return its result.

    If it fails on one process, it fails on all, after all have called it. Every process must call this; a single one
    just calls `act`. An error that is no Exception, such as KeyboardInterrupt, is raised at once.

    Args:
        call: the user's call, for errors.

    Raises:
        CheckpointError: a process does not come.
        Exception: the error of `act`, here or on the first other process with one.
    """
    if processes() == 1:
        return act()
    result, error = attempt(act)
    Meeting(call, "", range(processes()))
    errors = [pickle.loads(e) for e in exchange_objects(pickle_error(error))]
    if error is not None:
        raise error
    if (other_error := next((e for e in errors if e is not None), None)) is not None:
        raise other_error
    return result  # type: ignore[return-value]


def save_once(folder: str, values: str, act: Callable[[], object]) -> None:
    """Call `act` on the first of some processes that hold the same values, to save them.

    The others wait for its end, and raise the same exception if it raised one.

    Rank 0 calls `act` at once, as it may be the only one that saves, and leaves its end or its exception in the store.
    Another rank waits 30 seconds for it (`GRAFT_PATIENCE`), then calls `act` itself. The store counts the saves of the
    same values, so that a repeated save waits for its own turn.

    Args:
        values: a text that is equal for equal values.

    Raises:
        DistributedError: rank 0 saved other values into `folder` last, and not these in that time.
    """
    shelf = get_store()
    place = f"graft/saved/{hash_text(os.path.abspath(folder))}"
    saves = f"{place}/{values}"  # the same values may be saved again, such as after an error
    if dist.get_rank():
        seen = f"{saves}/seen by {dist.get_rank()}"
        number = max(shelf.add(saves, 0), shelf.add(seen, 0) + 1)
        key = f"{saves}/{number}"
        try:
            shelf.wait([key], timedelta(seconds=PATIENCE))
        except RuntimeError:
            if shelf.check([place]) and shelf.get(place) != values.encode():
                raise DistributedError(
                    f"Rank 0 saved other values into {folder} than rank {dist.get_rank()} has. Average the gradients "
                    "of all that trains, or save on rank 0 alone."
                ) from None
            act()
            return
        shelf.add(seen, 1)  # not `number`: rank 0 may be one save ahead of this process
        if (error := pickle.loads(shelf.get(key))) is not None:
            raise error
        return
    key = f"{saves}/{shelf.add(saves, 1)}"
    try:
        act()
    except BaseException as e:
        leave_error(shelf, key, e)
        raise
    shelf.set(place, values)
    leave_error(shelf, key, None)


class RankNote:
    """A text that a process leaves in the store for the others. Nobody waits."""

    def __init__(self, topic: str, text: str):
        """Write `text` into the store, under a number that counts this rank's notes on `topic`."""
        about, rank, self.text = f"graft/note/{hash_text(topic)}", dist.get_rank(), text
        self.key = f"{about}/{get_store().add(f'{about}/{rank}', 1)}"  # the same notes may follow each other
        get_store().set(f"{self.key}/{rank}", text)

    def list_differing_ranks(self) -> list[int]:
        """Return the ranks that have left another text under this key in the store by now.

        Ranks without a text do not count; does not wait.
        """
        keys, shelf = {rank: f"{self.key}/{rank}" for rank in range(dist.get_world_size())}, get_store()
        return [r for r, k in keys.items() if shelf.check([k]) and shelf.get(k) != self.text.encode()]
