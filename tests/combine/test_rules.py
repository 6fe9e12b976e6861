# SPDX-License-Identifier: Apache-2.0
"""The rules on tensors, against their definitions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils import merge_utils as theirs

import graft
from graft.combine import rules
from tests import models
from tests.pair import close
from tests.raised import refuses

quick = settings(max_examples=60, deadline=None, derandomize=True)
numbers = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=30)  # few different ones: many draws
densities = st.floats(0, 1.2)


@st.composite
def several(draw):
    """Tensors of one shape, and a weight for each."""
    shape = draw(st.sampled_from([(1,), (7,), (3, 4), (2, 3, 2)]))
    n, seed = draw(st.integers(1, 4)), draw(st.integers(0, 99))
    with models.seeded(seed):
        # quarters and eighths: sums are exact, so that a draw is a draw
        tensors = [torch.randint(-4, 5, shape) / 4 for _ in range(n)]
    return tensors, draw(st.lists(st.integers(-8, 8).map(lambda i: i / 8), min_size=n, max_size=n))


def of(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


@quick
@given(numbers, densities)
def test_pruning_keeps_the_largest(values, density):
    t = of(values)
    kept = rules.keep_largest(t, density)
    mask = kept != 0
    assert torch.equal(kept[mask], t[mask])
    n = min(len(values), int(density * len(values)))
    assert int(mask.sum()) == min(n, int((t != 0).sum()))
    if n < len(values) and mask.any():
        assert kept[mask].abs().min() >= t[~mask].abs().max()


@quick
@given(st.integers(0, 200), st.floats(0.05, 1.5))
def test_dropping_keeps_some_and_rescales_them(seed, density):
    with models.seeded(seed):
        t = torch.randn(5, 8, dtype=torch.float64)
        before = t.clone()
        kept = rules.drop_and_rescale(t, density)
    mask = kept != 0
    close(kept[mask], t[mask] / min(density, 1), 1e-12)
    assert torch.equal(t, before) and (bool(mask.all()) or density < 1)


def test_dropping_keeps_the_expectation():
    with models.seeded(0):
        ones = rules.drop_and_rescale(torch.ones(100_000), 0.3)
    assert abs(float(ones.mean()) - 1) < 0.02 and ones.unique().tolist() == pytest.approx([0, 1 / 0.3])


def test_density_zero_leaves_nothing():
    for prune in (rules.keep_largest, rules.drop_and_rescale):
        assert torch.equal(prune(torch.randn(4), 0), torch.zeros(4))


@quick
@given(several(), st.sampled_from(["total", "frequency"]))
def test_election(tensors_and_weights, method):
    """Element by element, as the paper has it."""
    tensors, weights = tensors_and_weights
    ours = rules.add_agreeing(tensors, weights, method).flatten()
    for i in range(len(ours)):
        values = [float(t.flatten()[i]) for t in tensors]
        vote = sum(values if method == "total" else [(v > 0) - (v < 0) for v in values])
        sign = 1 if vote >= 0 else -1
        agreeing = [w * v for v, w in zip(values, weights) if v * sign > 0]
        assert math.isclose(float(ours[i]), sum(agreeing) / max(1, len(agreeing)), abs_tol=1e-6)


@quick
@given(several())
def test_linear_is_the_weighted_sum(tensors_and_weights):
    tensors, weights = tensors_and_weights
    before = [t.clone() for t in tensors]
    assert torch.equal(rules.linear(tensors, weights), sum(t * w for t, w in zip(tensors, weights)))
    assert all(map(torch.equal, tensors, before))


SAME = {"linear": "task_arithmetic", **{n: n for n in ("magnitude_prune", "ties", "dare_linear", "dare_ties")}}


@pytest.mark.parametrize("density", [0.0625, 0.5, 1.5])
@pytest.mark.parametrize("method", [None, "frequency"])
@pytest.mark.parametrize("name", SAME)
def test_equal_to_peft(name, method, density):
    with models.seeded(3):
        tensors, weights = [torch.randn(6, 9) for _ in range(3)], torch.tensor([0.7, -1.3, 0.4])
    options = {} if name == "linear" else {"density": density}
    if method and name.endswith("ties"):
        options["majority_sign_method"] = method
    results = []
    for rule in (getattr(rules, name), getattr(theirs, SAME[name])):
        with models.seeded(5):
            results.append(rule([t.clone() for t in tensors], weights, **options))
    close(*results, 1e-6)


@pytest.mark.parametrize("rule", [rules.magnitude_prune, rules.dare_linear, rules.ties, rules.dare_ties])
def test_a_negative_density_is_refused(rule):
    for odd in (float("nan"), "x"):
        refuses(graft.ConfigError, r"Density should be >= 0", rule, [torch.ones(2)], [1.0], odd)
    refuses(graft.ConfigError, r"Density should be >= 0, got -0\.5", rule, [torch.ones(2)], [1.0], -0.5)


def test_an_unknown_vote_is_refused():
    refuses(graft.ConfigError, 'Unimplemented mask method "mean"', rules.ties, [torch.ones(2)], [1.0], 0.5, "mean")


# low-rank products


def products(ranks, m=11, n=7, groups=1, dtype=torch.float64):
    with models.seeded(1):
        A = [torch.randn(groups, r, n, dtype=dtype) for r in ranks]
        B = [torch.randn(groups, m, r, dtype=dtype) for r in ranks]
    return A, B, [0.7, -1.3, 0.4][: len(ranks)]


def total(A, B, weights):
    return sum(w * (b @ a) for a, b, w in zip(A, B, weights))


@pytest.mark.parametrize("groups", [1, 3])
def test_cat_is_exact(groups):
    A, B, weights = products([2, 1, 3], groups=groups)
    a, b = rules.concatenate_factors(A, B, weights)
    assert a.shape == (groups, 6, 7) and b.shape == (groups, 11, 6)
    close(b @ a, total(A, B, weights), 1e-12)


def truncated(W, rank):
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return (U[..., :rank] * S[..., None, :rank]) @ Vh[..., :rank, :]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("ranks", [[2], [2, 1, 3], [4, 5, 6]])  # the last: more than the matrix has
@pytest.mark.parametrize("rank", [1, 2, 5, 7])
def test_truncation_is_optimal(rank, ranks, groups):
    A, B, weights = products(ranks, groups=groups)
    W = total(A, B, weights)
    a, b, S = rules.truncate_product(*rules.concatenate_factors(A, B, weights), rank)
    assert a.shape == (groups, rank, 7) and b.shape == (groups, 11, rank)
    close(b @ a, truncated(W, rank), 1e-10)
    close(a @ a.mT, torch.eye(rank, dtype=a.dtype).expand(groups, -1, -1), 1e-10)
    kept = (b @ a).square().sum() / W.square().sum()
    assert rules.compute_retained_energy(S, rank) == pytest.approx(float(kept))
    if rank == 7:
        assert rules.compute_retained_energy(S, rank) == pytest.approx(1)
    a, b, S = rules.truncate_matrix(W, rank)
    close(b @ a, truncated(W, rank), 1e-10)
    assert rules.compute_retained_energy(S, rank) == pytest.approx(float(kept))


def test_no_full_matrix_is_made(monkeypatch):
    """The largest that LAPACK sees is (in or out) × Σr."""
    seen = []
    for name in ("qr", "svd"):
        function = getattr(torch.linalg, name)
        spy = lambda M, *args, f=function, **kwargs: seen.append(tuple(M.shape)) or f(M, *args, **kwargs)
        monkeypatch.setattr(torch.linalg, name, spy)
    A, B, weights = products([2, 3], m=500, n=400)
    rules.truncate_product(*rules.concatenate_factors(A, B, weights), 2)
    assert seen == [(1, 500, 5), (1, 400, 5), (1, 5, 5)]


def test_truncating_nothing():
    A, B, _ = products([2])
    a, b, S = rules.truncate_product(A[0], 0 * B[0], 2)
    assert not b.any() and rules.compute_retained_energy(S, 2) == 1
    close(a @ a.mT, torch.eye(2, dtype=a.dtype)[None], 1e-10)


@quick
@given(st.floats(0, 1))
def test_clamping_to_a_quantile(q):
    A, B, _ = products([2])
    a, b = rules.clamp_to_quantile(A[0], B[0], q)
    most = torch.cat([A[0].flatten(), B[0].flatten()]).quantile(q)
    assert torch.equal(a, A[0].clamp(-most, most)) and torch.equal(b, B[0].clamp(-most, most))
