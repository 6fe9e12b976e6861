# SPDX-License-Identifier: Apache-2.0
"""A block of experts run by groups of rows, against one token after the other."""

import pytest
import torch
from torch.testing import assert_close

from graft.kernels import experts
from graft.kernels.experts import LowRankUpdate, UpdatedStack
from tests.kernels import references

TOKENS, WIDTH, INNER, EXPERTS, USED = 9, 6, 5, 4, 2


class Held:
    """A dense stack that counts what it hands out, as if that were dequantized."""

    def __init__(self, W):
        self.W, self.shape, self.counts = W, tuple(W.shape), [0] * len(W)

    def dense(self, some, dtype):
        for e in some:
            self.counts[e] += 1
        self.largest = max(getattr(self, "largest", 0), len(some))
        return self.W[some].to(dtype)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def act(y):
    return y[..., ::2].tanh() * y[..., 1::2]


def problem(biased=True, missing=False):
    """Return the stacks, their biases and the norm; tokens, the experts of each, and their weights."""
    up, down = Held(random(EXPERTS, 2 * INNER, WIDTH, seed=1)), Held(random(EXPERTS, WIDTH, INNER, seed=2))
    index = random(TOKENS, EXPERTS - 1).argsort()[:, :USED].contiguous()  # nobody uses the last
    if missing:
        index[0, 1], index[3, 0] = EXPERTS, EXPERTS + 2
    biases = (random(EXPERTS, 2 * INNER, seed=3), random(EXPERTS, WIDTH, seed=4)) if biased else (None, None)
    tokens = random(TOKENS, WIDTH, seed=5), index, random(TOKENS, USED, seed=6).softmax(1)
    return up, down, biases, torch.tanh if biased else None, *tokens


def parts(groups, gated):
    out = {"up": [], "down": []}
    for i, r in enumerate((2, 3)):
        for name, (a, b) in {"up": (WIDTH, 2 * INNER), "down": (INNER, WIDTH)}.items():
            gate = random(TOKENS, seed=20 + i) if gated else None
            out[name].append(LowRankUpdate(random(EXPERTS, r, a, seed=i), random(EXPERTS, b, r, seed=10 + i),
                                  i if groups else None, gate))  # fmt: skip
    return out


@pytest.mark.parametrize("size", [1, 2, EXPERTS])
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("groups, gated", [(False, False), (True, False), (True, True), (False, True)])
def test_groups_of_rows_are_one_token_after_the_other(monkeypatch, size, missing, groups, gated):
    """Values and all gradients; each matrix in use is dequantized once in either direction, `size` at a time."""
    monkeypatch.setattr(experts, "BUDGET", size * 8 * 2 * INNER * WIDTH)
    up, down, biases, norm, x, index, weights = problem(missing=missing)
    group = torch.arange(TOKENS) % 3 if groups else None  # the last has no part
    held = parts(groups, gated)
    trained = [x, weights, *(t for some in held.values() for p in some for t in (p.A, p.B, p.gate) if t is not None)]
    for t in trained:
        t.requires_grad_()
    block = UpdatedStack(up, held["up"], biases[0]), act, UpdatedStack(down, held["down"], biases[1]), norm, group
    found = experts.run_experts(x, index, weights, *block, 3 if groups else 1)
    used = [int(e in index) for e in range(EXPERTS)]
    assert up.counts == down.counts == used and up.largest == min(size, sum(used))
    grads = torch.autograd.grad(found.sin().sum(), trained)
    assert up.counts == down.counts == [2 * n for n in used]
    expected = references.plain_run_experts(x, index, weights, *block)
    assert_close(found, expected)
    assert_close(grads, torch.autograd.grad(expected.sin().sum(), trained))


def test_without_gradients_nothing_is_dequantized_twice():
    up, down, _, _, x, index, weights = problem(biased=False)
    held = parts(False, False)
    for p in (*held["up"], *held["down"]):
        p.B.requires_grad_()
    block = UpdatedStack(up, held["up"]), act, UpdatedStack(down, held["down"])
    experts.run_experts(x, index, weights, *block).sum().backward()  # the input of `up` needs no gradient
    used = [int(e in index) for e in range(EXPERTS)]
    assert up.counts == used and down.counts == [2 * n for n in used]
    assert held["up"][0].B.grad.any() and not held["up"][0].B.grad[EXPERTS - 1].any()


def test_half_precision_computes_updates_in_their_own_dtype_and_sums_in_float32():
    up, down, _, _, x, index, weights = problem(biased=False)
    low = {k: [LowRankUpdate(p.A.float(), p.B.float()) for p in some] for k, some in parts(False, False).items()}
    wide = {k: [LowRankUpdate(p.A.double(), p.B.double()) for p in some] for k, some in low.items()}
    block = UpdatedStack(up, low["up"]), act, UpdatedStack(down, low["down"])
    expected = references.plain_run_experts(
        x, index, weights, UpdatedStack(up, wide["up"]), act, UpdatedStack(down, wide["down"])
    )
    half = experts.run_experts(x.bfloat16(), index, weights.float(), *block)
    with torch.autocast("cpu", torch.bfloat16):
        auto = experts.run_experts(x.float(), index, weights.float(), *block)
    assert half.dtype == torch.bfloat16 and auto.dtype == torch.float32
    for y in (half, auto):
        assert (y - expected).norm() < 0.03 * expected.norm()


def test_biases_of_a_wider_dtype_leave_the_products_in_theirs():
    up, down, biases, _, x, index, weights = problem()
    dtypes = []

    def watched(y):
        dtypes.append(y.dtype)
        return act(y)

    block = UpdatedStack(up, (), biases[0]), watched, UpdatedStack(down, (), biases[1]), watched
    assert experts.run_experts(x.bfloat16(), index, weights, *block).dtype == torch.bfloat16
    assert dtypes == [torch.bfloat16] * 2
