# SPDX-License-Identifier: Apache-2.0
"""Stacked factors of several adapters: the same bits as each on its rows, forward and backward, and a second time."""

import pytest
import torch
from torch import nn

from graft.kernels.segments import Segment, group_segments, segments_linear
from tests.models import seeded

INPUT = 96


class Side:
    """Factors that lie side by side, as those of a bank do."""

    def __init__(self, n, out, r):
        self.A, self.B = torch.randn(n, r, INPUT).requires_grad_(), torch.randn(n, out, r).requires_grad_()
        self.rows = [(a.detach().requires_grad_(), b.detach().requires_grad_()) for a, b in zip(self.A, self.B)]
        self.index = {id(t): (k, i) for i, row in enumerate(self.rows) for k, t in enumerate(row)}

    def follows(self, a, b):
        (k, i), (m, j) = self.index[id(a)], self.index[id(b)]
        return k == m and i + 1 == j

    def sink(self, t):
        return None

    def stack(self, first, n):
        k, i = self.index[id(first)]
        assert i == 0 and n == len(self.rows)
        return (self.A, self.B)[k]


def results(base, x, groups, leaves):
    given = x.clone().requires_grad_()
    y = segments_linear(base, lambda g, W: g @ W, base.weight.detach(), given, groups)
    with seeded(1):
        weights = torch.randn_like(y)
    return y, torch.autograd.grad((y * weights).sum(), [given, *leaves], create_graph=True)


@pytest.mark.parametrize("rows", [4, 5, 16, 24, 63, 64, 100])
@pytest.mark.parametrize("r", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("out", [32, 96, 160])
def test_stacked_is_one_by_one(rows, r, out):
    with seeded(0):
        base, side, x = nn.Linear(INPUT, out).requires_grad_(False), Side(3, out, r), torch.randn(3 * rows, INPUT)
    segments = [Segment(rows, A, B, 1.37) for A, B in side.rows]
    groups = group_segments(segments, side, x.dtype)
    if len(groups) > 1:
        assert r == 1 or rows * r * out < 400, "torch takes other products for these"
        return
    y, (dx, dA, dB) = results(base, x, groups, (side.A, side.B))
    leaves = [t for row in side.rows for t in row]
    apart, (dx_apart, *grads) = results(base, x, group_segments(segments, None, x.dtype), leaves)
    assert torch.equal(y, apart) and torch.equal(dx, dx_apart)
    assert all(map(torch.equal, dA, grads[::2])) and all(map(torch.equal, dB, grads[1::2]))


def test_a_second_derivative_of_rows_in_another_dtype_than_the_factors():
    with seeded(0):
        base, side, x = nn.Linear(INPUT, 32).requires_grad_(False), Side(2, 32, 8), torch.randn(10, INPUT)
    base, x, found = base.double(), x.double(), []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.detach().to(dtype).requires_grad_() for row in side.rows for t in row]
        segments = [Segment(5, A, B, 1.37) for A, B in zip(leaves[::2], leaves[1::2])]
        gradients = results(base, x, group_segments(segments, None, dtype), leaves)[1]
        found.append(torch.autograd.grad(sum(g.double().square().sum() for g in gradients), leaves))
    for narrow, wide in zip(*found):
        torch.testing.assert_close(narrow.double(), wide, rtol=1e-4, atol=1e-4 * float(wide.abs().max()))


def test_a_second_derivative():
    with seeded(0):
        base, side, x = nn.Linear(INPUT, 32).requires_grad_(False), Side(3, 32, 8), torch.randn(15, INPUT)
    segments, leaves = [Segment(5, A, B, 1.37) for A, B in side.rows], [t for row in side.rows for t in row]
    one, other = (
        ([side.A, side.B], group_segments(segments, side, x.dtype)),
        (leaves, group_segments(segments, None, x.dtype)),
    )
    assert len(one[1]) == 1 < len(other[1])
    (dA, dB), found = (
        torch.autograd.grad(sum(g.square().sum() for g in results(base, x, groups, own)[1]), own)
        for own, groups in (one, other)
    )
    torch.testing.assert_close(dA, torch.stack(found[::2]), rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(dB, torch.stack(found[1::2]), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("rows, r, out", [(4, 2, 32), (64, 16, 160), (300, 16, 96)])
def test_values_and_derivatives_are_those_of_the_formula(rows, r, out, stacked):
    with seeded(0):
        base, side, x = nn.Linear(INPUT, out).requires_grad_(False), Side(3, out, r), torch.randn(3 * rows, INPUT)
    segments, leaves = [Segment(rows, A, B, 1.37) for A, B in side.rows], [t for row in side.rows for t in row]
    groups = group_segments(segments, side if stacked else None, x.dtype)
    own = [side.A, side.B] if len(groups) == 1 else leaves
    y, (dx, *grads) = results(base, x, groups, own)
    wide = [t.detach().double().requires_grad_() for t in (x, side.A, side.B)]
    parts = [1.37 * part @ a.T @ b.T for part, a, b in zip(wide[0].chunk(3), wide[1], wide[2])]
    expected = wide[0] @ base.weight.double().T + base.bias.double() + torch.cat(parts)
    with seeded(1):
        weights = torch.randn_like(y).double()
    exact = torch.autograd.grad((expected * weights).sum(), wide, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in exact), wide[1:])
    seconds = torch.autograd.grad(sum(g.square().sum() for g in (dx, *grads)), own)

    def close(ours, theirs):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))

    def stack(values):
        return values if len(groups) == 1 else (torch.stack(values[::2]), torch.stack(values[1::2]))

    given = x.clone().requires_grad_()
    once = segments_linear(base, lambda g, W: g @ W, base.weight.detach(), given, groups)
    first = torch.autograd.grad((once * weights.float()).sum(), [given, *own])  # another path than with create_graph
    close(y, expected)
    close(dx, exact[0])
    close(first[0], exact[0])
    for found, wanted in ((stack(grads), exact[1:]), (stack(first[1:]), exact[1:]), (stack(seconds), second)):
        close(found[0], wanted[0])
        close(found[1], wanted[1])
