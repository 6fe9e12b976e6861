# SPDX-License-Identifier: Apache-2.0
"""What processes leave each other in the store, by turns in one process; tests/distributed has real ones."""

import pytest
import torch.distributed as dist

from graft.io import rendezvous
from tests.raised import refuses


@pytest.fixture
def saved(monkeypatch):
    """Return what saves the same values as a rank, and the ranks that have written."""
    shelf, written = dist.HashStore(), []
    monkeypatch.setattr(rendezvous, "get_store", lambda: shelf)
    monkeypatch.setattr(rendezvous, "PATIENCE", 0.05)

    def save(rank, error=None):
        def act():
            if error is not None:
                raise error
            written.append(rank)

        monkeypatch.setattr(rendezvous.dist, "get_rank", lambda: rank)
        rendezvous.save_once("folder", "values", act)

    return save, written


def test_the_first_may_be_saves_ahead(saved):
    save, written = saved
    for rank in (0, 0, 0, 1, 1, 1, 0, 1):
        save(rank)
    assert written == [0, 0, 0, 0]


def test_a_save_after_an_error_has_its_own_end(saved):
    save, written = saved
    for rank in (0, 1):
        refuses(OSError, "no space", save, rank, OSError("no space"))
    for rank in (0, 1):
        save(rank)
    assert written == [0]


def test_notes_that_differ_are_found(monkeypatch):
    shelf, here = dist.HashStore(), [0]
    monkeypatch.setattr(rendezvous, "get_store", lambda: shelf)
    monkeypatch.setattr(rendezvous.dist, "get_rank", lambda: here[0])
    monkeypatch.setattr(rendezvous.dist, "get_world_size", lambda: 3)
    first = rendezvous.RankNote("topic", "a")
    assert first.list_differing_ranks() == []
    for here[0], text in ((1, "b"), (2, "a")):
        rendezvous.RankNote("topic", text)
    assert first.list_differing_ranks() == [1]


@pytest.mark.parametrize("fails_here", [True, False])
@pytest.mark.parametrize("fails_there", [True, False])
def test_an_error_of_one_process_is_raised_on_all(monkeypatch, fails_here, fails_there):
    def act():
        if fails_here:
            raise KeyError("here")
        return 3

    there = rendezvous.pickle_error(OSError("there") if fails_there else None)
    monkeypatch.setattr(rendezvous, "processes", lambda: 2)
    monkeypatch.setattr(rendezvous, "Meeting", lambda *args: None)
    monkeypatch.setattr(rendezvous, "exchange_objects", lambda error: [there, error])
    if not (fails_here or fails_there):
        assert rendezvous.run_on_all(act, "save()") == 3
        return
    refuses(KeyError if fails_here else OSError, "here", rendezvous.run_on_all, act, "save()")
