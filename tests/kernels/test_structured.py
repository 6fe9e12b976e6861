# SPDX-License-Identifier: Apache-2.0
"""Products with matrices of a structure that saves work: as with the whole matrix, forward and backward."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from graft.kernels import structured, transforms
from graft.kernels.structured import Kronecker
from graft.kernels.transforms import Circulant, Plain, Sparse, Spectrum, Wavelet, Waves
from graft.methods.waveft import HIGH, LOW
from tests.kernels import references
from tests.models import seeded

ROWS = 7


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def entries(n, out, fan_in):
    places = torch.randperm(out * fan_in)[:n]
    return places // fan_in, places % fan_in


def spectrum(out, fan_in):
    u, v = entries(out * fan_in // 2, out, fan_in)
    return lambda c: Spectrum(c, torch.stack((u, v)), (out, fan_in), 3.7, (out, fan_in)), (len(u),)


def wavelet(family, out, fan_in):
    S, T = (Wavelet(n, LOW[family], HIGH[family]) for n in (out, fan_in))
    u, v = entries(17, S.size, T.size)
    return lambda c: Sparse(c[None], u, v, S, T, (out, fan_in)), (17,)


def scattered(out, fan_in):
    u, v = entries(17, out, fan_in)
    return lambda c: Sparse(c[None], u, v, Plain(out), Plain(fan_in), (out, fan_in)), (17,)


class Shaped:
    """A product by its function, and its whole matrix by its value."""

    def __init__(self, value, times):
        self.value, self.times = value, times

    def __getattr__(self, name):
        return getattr(self.value, name)


def circulant(m, n, b):
    def make(w):
        return Shaped(Circulant(w, 1.0, (m * b, n * b)), lambda x: transforms.multiply_circulant(x, w))

    return make, (m, n, b)


def kron(l, m, k, n):
    def make(c):
        a, b = c[: l * m].view(l, m), c[l * m :].view(k, n)
        return Shaped(Kronecker(a, b, (l * k, m * n)), lambda x: structured.multiply_kronecker(x, a, b))

    return make, (l * m + k * n,)


with seeded(0):
    CASES = {
        "circulant": circulant(2, 3, 5),
        "circulant even": circulant(3, 1, 6),
        "kronecker": kron(2, 3, 5, 4),
        "kronecker other order": kron(5, 4, 2, 3),
        "fourier": spectrum(9, 7),
        "fourier even": spectrum(8, 10),
        "fourier mixed": spectrum(1, 6),
        "wavelet": wavelet("db1", 6, 9),
        "wavelet long": wavelet("db4", 10, 13),
        "wavelet longer than the layer": wavelet("coif2", 5, 4),
        "entries": scattered(6, 9),
    }
every = pytest.mark.parametrize("name", CASES)


def case(name):
    make, size = CASES[name]
    with seeded(1):
        c = drawn(*size)
        x = drawn(ROWS, make(c).dense().shape[1])
    return make, c, x


@every
def test_a_product_is_that_with_the_whole_matrix(name):
    make, c, x = case(name)
    value = make(c)
    y = x @ value.dense().T
    assert y.abs().mean() > 1e-3
    assert_close(value.times(x), y)
    assert_close(value.times(x.view(1, ROWS, -1)), y[None])
    assert_close(value.times(x[0]), y[0])
    assert_close(value.times(x[:0]), y[:0])
    assert_close(value.times(x.float()).double(), y, rtol=1e-4, atol=1e-4)
    assert make(c.float()).times(x.bfloat16()).dtype == torch.float32


@every
def test_gradients_of_both_orders(name):
    make, c, x = case(name)
    values = c.requires_grad_(), x[:3].requires_grad_()
    assert torch.autograd.gradcheck(lambda c, x: make(c).times(x), values, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda c, x: make(c).times(x), values, fast_mode=True)


@every
def test_columns_of_an_embedding(name):
    make, c, _ = case(name)
    W = make(c).dense()
    ids = torch.arange(W.shape[1]).flip(0).view(1, -1)
    assert_close(make(c).columns(ids), W.T[ids])


def test_entries_of_one_place_add_up():
    u, v = torch.tensor([0, 2, 0]), torch.tensor([1, 1, 1])
    W = Sparse(torch.tensor([[1.0, 2.0, 4.0]]), u, v, Plain(3), Plain(2), (3, 2))
    expected = torch.tensor([[0.0, 5.0], [0.0, 0.0], [0.0, 2.0]])
    assert_close(W.dense(), expected)
    assert_close(W.columns(torch.tensor([1, 0])), expected.T[[1, 0]])
    assert_close(W.times(torch.eye(2)), expected.T)


@every
def test_transforms_of_functions(name):
    make, c, x = case(name)
    W, v = make(c).dense(), x.flip(0)
    assert_close(torch.func.vmap(lambda x: make(c).times(x))(x), x @ W.T)
    assert_close(torch.func.jvp(lambda x: make(c).times(x), (x,), (v,))[1], v @ W.T)
    one = torch.func.grad(lambda c, x: make(c).times(x).square().sum())
    assert_close(torch.func.vmap(one, (None, 0))(c, x), torch.stack([one(c, row) for row in x]))


@every
def test_what_the_backward_pass_needs(name):
    """x and the description; no transform of x, no matrix."""
    make, c, x = case(name)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        make(c.requires_grad_()).times(x.requires_grad_())
    large = [t for t in seen if t.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()]
    assert all(t.numel() <= c.numel() * 2 for t in large)


@pytest.mark.parametrize("S", [Waves(7), Waves(8), Wavelet(9, LOW["sym4"], HIGH["sym4"]), Plain(5)], ids=str)
def test_a_synthesis_is_the_analysis_transposed(S):
    x = drawn(3, S.n)
    d, z = S.factors(torch.arange(S.size))[:, None], [drawn(S.size, 3) for _ in S.analysis(x)]
    back = S.synthesis([d * part for part in z])
    assert_close(sum((a * b).sum() for a, b in zip(S.analysis(x), z)), (back * x).sum())
    whole = S.analysis(torch.eye(S.n, dtype=torch.float64))
    for part, elements in zip(whole, S.at(torch.arange(S.size), torch.arange(S.n), x.dtype)):
        assert_close(elements, part)


def test_sums_are_gathered_in_pieces(monkeypatch):
    make, c, x = case("wavelet long")
    whole = torch.func.grad(lambda c: make(c).times(x).square().sum())(c)
    monkeypatch.setattr(transforms, "AT_ONCE", 2 * ROWS)
    make(c.requires_grad_()).times(x).square().sum().backward()
    assert_close(c.grad, whole)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_factors_of_blocks(k):
    with seeded(0):
        A, B, x = torch.randn(k, 5, 2 * k), torch.randn(k, 2 * k, 4), torch.randn(2, 3, 5 * k)
        general = nn.Linear(5 * k, 3, bias=False), nn.Linear(3, 4 * k, bias=False)
    down, up = structured.Inputs(A), structured.Outputs(B)
    close = dict(rtol=1e-5, atol=1e-5)
    assert_close(up(down(x)), references.plain_blocks(x, A, B), **close)
    assert_close(x @ (up.weight @ down.weight).T, up(down(x)), **close)
    down, up = structured.Inputs(A, general[0]), structured.Outputs(B, general[1])
    assert_close(up(down(x)), references.plain_blocks(x, A, B) + general[1](general[0](x)), **close)
    assert_close(x @ (up.weight @ down.weight).T, up(down(x)), **close)
