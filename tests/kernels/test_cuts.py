# SPDX-License-Identifier: Apache-2.0
"""Tensors in pieces, by two threads that exchange them as processes do; tests/distributed has real processes."""

from threading import Barrier
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from graft.kernels import cuts
from graft.kernels.cuts import Cut, cut_tensor, join_pieces, take_piece
from graft.kernels.decomposed import row_norms
from tests.threads import at_once

WORLD = 2


@pytest.fixture(autouse=True)
def exchange(monkeypatch):
    """The collective functions, for groups that are a rank, a barrier and the tensors of all ranks."""

    def collect(t, group):
        group.tensors[group.rank] = t
        group.barrier.wait(10)
        found = [group.tensors[rank].clone() for rank in range(WORLD)]
        group.barrier.wait(10)
        return found

    def all_gather(outputs, t, group):
        for output, value in zip(outputs, collect(t, group), strict=True):
            output.copy_(value)

    monkeypatch.setattr(cuts.dist, "all_gather", all_gather)
    monkeypatch.setattr(cuts.dist, "all_reduce", lambda t, group: t.copy_(sum(collect(t, group))))


def on_both(act, size, stripes=1):
    """Return the results of `act(cut)` on both ranks."""
    barrier, tensors = Barrier(WORLD), {}
    groups = [SimpleNamespace(rank=rank, barrier=barrier, tensors=tensors) for rank in range(WORLD)]
    results = {}

    def run(group):
        results[group.rank] = act(Cut(group, group.rank, WORLD, size, stripes))

    at_once(*(lambda group=group: run(group) for group in groups))
    return [results[rank] for rank in range(WORLD)]


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


@pytest.mark.parametrize("size, stripes", [(6, 1), (7, 1), (1, 1), (6, 2)])
def test_pieces_are_of_the_last_dimension_and_so_are_their_gradients(size, stripes):
    whole, weights = random(3, 4, size), torch.linspace(-1, 1, 12 * size, dtype=torch.float64).view(3, 4, size)

    def act(cut):
        t = whole.clone().requires_grad_()
        piece = cut_tensor(t, cut)
        assert torch.equal(piece, take_piece(whole, cut, 2))
        (piece * take_piece(weights, cut, 2)).sum().backward()
        own = take_piece(whole, cut, 2).clone().requires_grad_()
        joined = join_pieces(own, cut)
        (joined * weights).sum().backward()
        assert torch.equal(own.grad, take_piece(weights, cut, 2))
        return t.grad, joined.detach()

    for grad, joined in on_both(act, size, stripes=stripes):
        assert torch.equal(grad, weights) and torch.equal(joined, whole)


def test_norms_of_rows_in_pieces_are_those_of_the_whole():
    W, A, B = random(5, 7), random(3, 7), random(5, 3)
    expected = torch.linalg.vector_norm(W + B @ A, dim=1)
    for norms in on_both(lambda rows: row_norms(take_piece(W, rows, 0), A, B, rows=rows), len(W)):
        assert_close(norms, expected)
    for norms in on_both(lambda columns: row_norms(take_piece(W, columns, 1), A, B, columns=columns), W.shape[1]):
        assert_close(norms, expected)
