# SPDX-License-Identifier: Apache-2.0
"""The generator goes where torch's constructors would take it, whether values are drawn or skipped."""

import pytest
import torch
from torch import nn

from graft.core.ops import make_linear
from graft.core.random import _SCRATCH, _WORTH, DrawOnCPU, draw_from_seed, skip_draws
from tests.threads import at_once


@pytest.mark.parametrize(
    "sizes",
    [(1,), (2,), (3, 4), (15, 16), (577, 12), (_WORTH - 1,), (_WORTH - 3, 4), (2 * _SCRATCH + 1,), (5 * _SCRATCH,)],
)
def test_skipping_advances_like_filling(sizes):
    tensors = [torch.empty(n) for n in sizes]
    torch.manual_seed(5)
    for t in tensors:
        t.uniform_(-0.3, 0.3)
    state, following = torch.get_rng_state(), torch.randn(20)
    torch.manual_seed(5)
    skip_draws(*tensors)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(torch.randn(20), following)


def test_threads_draw_apart_from_a_seed():
    state, found = torch.get_rng_state(), {0: [], 1: []}

    def draw(seed):
        for _ in range(50):
            with draw_from_seed(seed):
                found[seed].append(torch.cat([torch.rand(1) for _ in range(40)]))

    at_once(lambda: draw(0), lambda: draw(1))
    for seed, drawn in found.items():
        twin = torch.Generator().manual_seed(seed)
        wanted = torch.cat([torch.rand(1, generator=twin) for _ in range(40)])
        assert len(drawn) == 50 and all(torch.equal(t, wanted) for t in drawn)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_take_their_own_steps(dtype):
    t = torch.empty(33, dtype=dtype)
    torch.manual_seed(5)
    t.uniform_()
    state = torch.get_rng_state()
    torch.manual_seed(5)
    skip_draws(t)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("fill", "inputs"), [(True, 7), (False, 7), (True, 0)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_linear_layer_draws_as_torchs(bias, fill, inputs):
    torch.manual_seed(5)
    theirs = nn.Linear(inputs, 9, bias=bias)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    ours = make_linear(inputs, 9, bias, fill)
    assert torch.equal(torch.get_rng_state(), state)
    if fill:
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))


DRAWS = {
    "rand": lambda: torch.rand(3, dtype=torch.float64),
    "rand_like": lambda: torch.rand_like(torch.ones(3), dtype=torch.float64),
    "multinomial": lambda: torch.multinomial(torch.ones(2), num_samples=5, replacement=True),
    "bernoulli": lambda: torch.bernoulli(input=torch.full((9,), 0.5)),
    "normal_": lambda: torch.empty(3).normal_(mean=2.0, std=0.1),
    "trunc_normal_": lambda: nn.init.trunc_normal_(tensor=torch.empty(9), a=-0.1, b=0.1),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_draws_on_the_cpu_are_torchs(draw):
    torch.manual_seed(5)
    expected = draw()
    torch.manual_seed(5)
    with DrawOnCPU():
        drawn = draw()
    assert torch.equal(drawn, expected) and drawn.dtype == expected.dtype


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_without_values_nothing_is_drawn(draw):
    state = torch.get_rng_state()
    with torch.device("meta"), DrawOnCPU():
        assert draw().is_meta and torch.rand(2, dtype=torch.float64).dtype == torch.float64
    assert torch.equal(torch.get_rng_state(), state)
