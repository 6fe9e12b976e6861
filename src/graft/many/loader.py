# SPDX-License-Identifier: Apache-2.0
"""The batches of one run, epoch after epoch, and the position in them, at which a saved run continues."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from hashlib import sha256
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from graft import ConfigError
from graft.many.draws import Draws, States

Batch = dict[str, Any]
END: Any = object()  # of an epoch


def annotate_error(error: BaseException, text: str) -> None:
    """Add a line to the text of an error. Python 3.10 has no notes: there nothing happens."""
    if hasattr(error, "add_note"):
        error.add_note(text)


class Loader:
    """Yields batches of `data`, which is iterated again when it ends, unless it is an iterator or `once` is set.

    Draws from the run's random states.

    Attributes:
        epoch: number of epochs begun before the current one.
        taken: batches taken from the current epoch.
        began: the random states when the current epoch began.
        first: digest of the very first batch, and the random states before it; None before it was read.
    """

    def __init__(self, label: str, data: Iterable[object] | None, draws: Draws, once: bool):
        """Begin before the first batch. Nothing is read yet.

        Args:
            label: the owner of the data in errors, such as "Run 'x'".
            data: an iterable of batches, which are mappings of names to tensors.
            draws: the run's random states.
            once: end with the data.

        Raises:
            TypeError: `data` is None or no iterable.
        """
        if data is None or not hasattr(data, "__iter__"):
            raise TypeError(f"{label}: data must be an iterable of batches, such as a DataLoader, got {data!r}.")
        self.label, self.data, self.draws = label, data, draws
        self.once = once or isinstance(data, Iterator)
        self.epoch, self.taken = 0, 0  # epochs begun before this one; batches of it
        self.began: States = draws.states  # when this epoch began
        self.first: tuple[str, States] | None = None  # the digest of the first batch, and the draws before it
        self._source = data
        self._batches: Iterator[object] | None = None
        self._is_broken = False  # an error has stopped the iterator, which may have lost a batch
        self._last: tuple[Batch, States, States] | None = None  # with the draws before and after it
        self._is_returned = False  # the last batch was given back

    def next_batch(self) -> Batch | None:
        """Return the next batch as a new dict. At the data's end begin the next epoch, with its random states in
        `began` and `taken` 0, or return None with `once`.

        A batch that was returned comes again, counts in `taken` again, and the random states become those after it.

        Counts the batch in `taken`, and keeps it with the random states before and after in `_last`. `first` gets the
        digest of the very first batch. The run's random states are used while the data is read, except from a list.
        After an error in reading, the error gets a note with the label, and the random states are those from before.
        The next call then seeks to the position again, except in an iterator.

        Raises:
            ConfigError: a batch is no mapping, or an epoch has no batch.
        """
        if self._is_returned and self._last is not None:
            self._is_returned = False
            last, _, self.draws.states = self._last
            self.taken += 1
            return dict(last)
        if self._is_broken:
            self.seek(self.epoch, self.taken, self.began, now=self.draws.states)
        before = self.draws.states
        try:
            # a list draws nothing
            with nullcontext() if type(self.data) is list else self.draws:
                batch = next(self._epoch_iterator(), END)
            if batch is not END and not isinstance(batch, Mapping):
                raise ConfigError(
                    f"{self.label}: a batch must be a mapping of the model's arguments to tensors, got a "
                    f"{type(batch).__name__}. Give the DataLoader a collate_fn that makes one."
                )
        except BaseException as error:
            annotate_error(error, f"{self.label}: reading the data raised this.")
            self.draws.states = before
            self._is_broken = not isinstance(self.data, Iterator)
            raise
        if batch is END and not self.taken:
            raise ConfigError(f"{self.label}: its data holds no batch (epoch {self.epoch + 1}). Pass some data.")
        if batch is END and not self.once:
            self._batches, self.epoch, self.taken = None, self.epoch + 1, 0
            self.began = self.draws.states
            return self.next_batch()
        if batch is END:
            return None
        if self.first is None and not self.epoch and not self.taken:
            self.first = digest_batch(dict(batch)), before
        self.taken += 1
        self._last = dict(batch), before, self.draws.states
        return dict(batch)

    def begins_with(self, first: tuple[str, States]) -> bool:
        """Return True if the first batch has the digest that was noted in `first`.

        Sets the run's random states to those in `first`, and reads one batch, so call `set_position` or `seek` next; an
        iterator still yields it, since `_source` puts it in front. `first` counts, which the very first batch has set;
        an earlier one stays.
        """
        self.draws.states = first[1]
        batch = self.next_batch()
        if isinstance(self.data, Iterator):
            self._source = chain([batch], self.data)
        return self.first is not None and self.first[0] == first[0]

    def return_batch(self) -> None:
        """Make `next_batch` return the last batch again, and put the random states back to those before it.

        `taken` falls by one. A batch must have been taken.
        """
        assert self._last is not None
        self._is_returned, self.draws.states = True, self._last[1]
        self.taken -= 1

    def _epoch_iterator(self) -> Iterator[object]:
        """Return the iterator of this epoch, made at the first call in it and kept in `_batches`.

        It is `iter(_source)`. `set_epoch(epoch)` is called before, of the data, then of its attribute `sampler`, where
        they have that method. `_source` is the data, or after `begins_with` an iterator's first batch and the iterator.
        """
        if self._batches is None:
            holder: Any
            for holder in (self.data, getattr(self.data, "sampler", None)):
                if hasattr(holder, "set_epoch"):
                    holder.set_epoch(self.epoch)
            self._batches = iter(self._source)
        return self._batches

    def set_position(self, epoch: int, taken: int, began: States, now: States) -> None:
        """Set `epoch`, `taken`, `began` and the random states, without reading data.

        Drops the iterator and a returned batch; the next `next_batch` seeks to the position, as `_is_broken` becomes
        True. `now`: the random states at the position.
        """
        self.epoch, self.taken, self.began, self._batches, self._is_returned = epoch, taken, began, None, False
        self._is_broken, self.draws.states = True, now

    def seek(self, epoch: int, taken: int, began: States, now: States) -> None:
        """Go to a position: begin the epoch with the random states `began`, and read and drop `taken` batches.

        Then the states are `now`, also after an error.

        Raises:
            ConfigError: the data holds fewer batches. After this and any other error the next `next_batch` seeks again.
        """
        self.set_position(epoch, taken, began, now)
        try:
            self.draws.states = began
            for i in range(taken):
                with self.draws:
                    missing = next(self._epoch_iterator(), END) is END
                if missing:
                    raise ConfigError(
                        f"{self.label} was saved after {taken} batches of an epoch, and its data holds {i}. Add "
                        "it with the data that it had."
                    )
        finally:
            self.draws.states = now
        self._is_broken = False


def digest_batch(batch: Batch) -> str:
    """Return a hash of a batch, 16 hex digits, whatever the order of its keys: dense tensors by shape, dtype and
    values, JSON values as they are, and any other object by the name of its class.
    """

    def note(value: object) -> object:
        """Return a list of the shape and "dtype:digest" for a dense tensor that is neither on meta nor nested; the
        qualified class name for any other object.
        """
        dense = isinstance(value, Tensor) and value.layout == torch.strided and not (value.is_meta or value.is_nested)
        if not dense:
            return type(value).__qualname__
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()  # type: ignore[attr-defined]
        dtype = str(value.dtype).removeprefix("torch.")  # type: ignore[attr-defined]
        return [*value.shape, f"{dtype}:{sha256(data).hexdigest()[:16]}"]  # type: ignore[attr-defined]

    items = sorted(batch.items(), key=lambda item: str(item[0]))
    return sha256(json.dumps(items, default=note, skipkeys=True).encode()).hexdigest()[:16]


def digest_first_batch(label: str, data: Iterable[object]) -> str:
    """Return the digest of the first batch of data that can be iterated again, read with seed 0.

    Raises:
        ConfigError: there is no batch, or it is no mapping. The error names `label`.
    """
    loader = Loader(label, data, Draws(0, data), once=True)
    loader.next_batch()
    assert loader.first is not None
    return loader.first[0]


def shares_position(data: object) -> bool:
    """Return True if all iterations over data share one position: it is an iterator, or a loader with
    `persistent_workers`.
    """
    return isinstance(data, Iterator) or bool(getattr(data, "persistent_workers", False))
