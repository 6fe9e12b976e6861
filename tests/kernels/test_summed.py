# SPDX-License-Identifier: Apache-2.0
"""The tensor that stands for W + Σ s · B A: whatever is done with it equals the same with the sum."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from graft.kernels.summed import Summed, make_sum
from tests.models import seeded

with seeded(0):
    W = torch.randn(4, 8, 12)
    PARTS = [(torch.randn(4, r, 12), torch.randn(4, 8, r), s) for r, s in ((2, 0.7), (3, -1.3))]
    X, ROWS, BATCH = torch.randn(5, 12), torch.randn(6, 12), torch.randn(4, 7, 12)
DENSE = W + sum(s * B @ A for A, B, s in PARTS)
OFFSETS = torch.tensor([1, 1, 3, 6], dtype=torch.int32)
IDS = torch.tensor([0, 3, 3, 1, 2])

APART = {  # these never form the sum
    "one": lambda S: F.linear(X, S[2]),
    "one with a bias": lambda S: F.linear(X, S[torch.tensor(2)], torch.ones(8)),
    "matrix": lambda S: X @ S[1].T,
    "t": lambda S: torch.mm(X, S[1].t()),
    "from the left": lambda S: S[1] @ X.T,
    "some": lambda S: torch.bmm(S[IDS], X.unsqueeze(-1)),
    "batch": lambda S: BATCH @ S.mT,
    "bmm": lambda S: torch.bmm(BATCH, S.transpose(-2, -1)),
    "grouped": lambda S: F.grouped_mm(ROWS, S.mT, offs=OFFSETS),
    "rows of none": lambda S: F.grouped_mm(torch.cat([ROWS, ROWS]), S.mT, offs=OFFSETS)[:6],
}
FORMED = {
    "arithmetic": lambda S: 2 * S + 1,
    "slice": lambda S: S[1:3],
    "mask": lambda S: S[torch.tensor([True, False, True, False])],
    "einsum": lambda S: torch.einsum("noi,bi->bno", S, X),
    "view": lambda S: S.reshape(-1),
    "vector": lambda S: S[0] @ X[0],
    "norm": lambda S: S.norm(dim=-1),
    "stack": lambda S: torch.stack([S[0], S[1]]),
    "linear by names": lambda S: F.linear(input=X, weight=S[2]),
    "bmm by names": lambda S: torch.bmm(BATCH, mat2=S.mT),
    "matmul by names": lambda S: torch.matmul(BATCH, other=S.transpose(dim0=1, dim1=2)),
    "grouped by names": lambda S: F.grouped_mm(ROWS, mat_b=S.mT, offs=OFFSETS),
}


@pytest.mark.parametrize("how", [*APART, *FORMED])
@pytest.mark.parametrize("flipped", [False, True], ids=["", "stored the other way"])
def test_it_is_the_sum(how, flipped, monkeypatch):
    S = make_sum(W, PARTS)
    if flipped:  # W, A and B of the transposed matrices, shown transposed
        S = make_sum(W.mT.contiguous(), [(B.mT, A.mT, s) for A, B, s in PARTS], True)
    if how in APART:
        monkeypatch.setattr(Summed, "materialize", lambda self: pytest.fail("formed the sum"))
    result = (APART | FORMED)[how](S)
    assert type(result) is torch.Tensor
    assert_close(result, (APART | FORMED)[how](DENSE), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_groups_in_inference_mode():
    """Offsets that a model computes there, which change in place without a sign."""
    S, offsets = make_sum(W, PARTS), OFFSETS + 0
    assert offsets.is_inference()
    for _ in range(2):
        assert_close(
            F.grouped_mm(ROWS, S.mT, offs=offsets), F.grouped_mm(ROWS, DENSE.mT, offs=offsets), rtol=1e-4, atol=1e-4
        )
        offsets.copy_(torch.tensor([2, 4, 5, 6]))


def test_facts_are_those_of_the_sum():
    for S, D in ((make_sum(W, PARTS), DENSE), (make_sum(W, PARTS, True), DENSE.mT)):
        assert (S.shape, S.dtype, S.device, S.dim(), len(S), S.numel()) == (
            D.shape, D.dtype, D.device, D.dim(), len(D), D.numel()
        )  # fmt: skip
        assert isinstance(S, torch.Tensor) and torch.is_floating_point(S)


@pytest.mark.parametrize("how", APART)
def test_gradients(how):
    def gradients(make):
        leaves = [t.clone().requires_grad_() for A, B, _ in PARTS for t in (A, B)]
        parts = [(A, B, s) for (A, B), (_, _, s) in zip(zip(leaves[::2], leaves[1::2]), PARTS)]
        APART[how](make(parts)).square().sum().backward()
        return [t.grad for t in leaves]

    ours = gradients(lambda parts: make_sum(W, parts))
    theirs = gradients(lambda parts: W + sum(s * B @ A for A, B, s in parts))
    for a, b in zip(ours, theirs):
        assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_half_precision_and_autocast():
    S = make_sum(W.bfloat16(), PARTS)
    y = F.linear(X.bfloat16(), S[1])
    assert y.dtype == torch.bfloat16
    assert_close(y.float(), F.linear(X, DENSE[1]), rtol=0.05, atol=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        y, wanted = F.linear(X, make_sum(W, PARTS)[1]), F.linear(X, DENSE[1])
    assert y.dtype == wanted.dtype
    assert_close(y, wanted, rtol=0.05, atol=0.3)
