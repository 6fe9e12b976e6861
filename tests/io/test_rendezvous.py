# SPDX-License-Identifier: Apache-2.0
"""What processes leave each other in the store, by turns in one process; tests/distributed has real ones."""

import pytest
import torch.distributed as dist

from graft.io import rendezvous


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
        with pytest.raises(OSError, match="no space"):
            save(rank, OSError("no space"))
    for rank in (0, 1):
        save(rank)
    assert written == [0]
