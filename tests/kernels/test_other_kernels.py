# SPDX-License-Identifier: Apache-2.0
"""The faster ways of the methods other than LoRA: kernels against plain formulas, layers against the folded weight."""

import copy

import peft
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import graft
import graft.core.fused as fused_forms
from graft.core.lean import find_dropout_rate
from graft.kernels import low_rank, narrow, one_product, orthogonal
from graft.kernels.low_rank import FUSED_FROM, worth_it
from graft.kernels.one_product import Difference, Factored, linear_with
from graft.kernels.sparse import Scattered
from tests.covering import Case, law
from tests.kernels import references
from tests.models import seeded

SCALE = 1.37
ROWS = FUSED_FROM + 6
IN, OUT = 40, 28


def randn(*shapes, dtype=torch.float32, grad=True):
    return [torch.randn(shape).to(dtype).requires_grad_(grad) for shape in shapes]


def wide(values):
    return [t.detach().double().requires_grad_(t.requires_grad) for t in values]


def results(function, values):
    """Output and gradients for a loss with different weights everywhere."""
    out = function(*values)
    with seeded(5):
        weights = torch.randn(out.shape)
    grads = torch.autograd.grad((out.to(weights.dtype) * weights).sum(), [t for t in values if t.requires_grad])
    return [out.detach(), *grads]


def errors(found, exact) -> list[float]:
    assert len(found) == len(exact)
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact)]


def agree(fused, plain, values):
    """Return output and gradients of the plain form in float64, with which those of the fused one agree."""
    exact = results(plain, wide(values))
    assert max(errors(results(fused, values), exact)) < 1e-6
    return exact


def not_worse(fused, plain, values):
    """The fused form's error is no larger than the plain one's."""
    exact = results(plain, wide(values))
    for ours, theirs in zip(errors(results(fused, values), exact), errors(results(plain, values), exact)):
        assert ours <= theirs * 1.05, (ours, theirs)


# Householder reflections


def reflections():
    with seeded(1):
        x, u = randn((2, ROWS // 2, 12), (12, 5))
    return x, *orthogonal.compact_reflections(u.detach())


def test_the_compact_form_is_the_product_of_the_reflections():
    with seeded(1):
        u = torch.randn(12, 5).double()
    H = torch.eye(12).double()
    for column in u.T:
        H = H - 2 * (H @ column)[:, None] * column / column.square().sum()
    U, T = orthogonal.compact_reflections(u)
    assert_close(torch.eye(12).double() - U @ T @ U.T, H)


@pytest.mark.parametrize("x_grad", [True, False])
def test_reflecting_equals_the_plain_formula(x_grad):
    x, U, T = reflections()
    values = x.detach().requires_grad_(x_grad), U.requires_grad_(), T.requires_grad_()
    assert worth_it(x)
    exact = agree(orthogonal.reflect, orthogonal.plain_reflect, values)
    assert len(exact) == 3 + x_grad


def test_reflecting_in_half_precision_errs_no_more():
    x, U, T = reflections()
    not_worse(
        orthogonal.reflect, orthogonal.plain_reflect, [x.detach().bfloat16().requires_grad_(), U, T.requires_grad_()]
    )


# orthogonal blocks


@pytest.mark.parametrize("terms", [None, 2, 3, 4, 5, 8])
def test_orthogonal_blocks_keep_one_matrix_and_have_the_plain_gradient(terms):
    with seeded(2):
        (v,) = randn((3, 6))
    Q = orthogonal.skew(v.detach() * 0.2, 4).requires_grad_()
    agree(lambda Q: orthogonal.orthogonal(Q, terms), lambda Q: orthogonal.cayley(Q, terms), [Q])
    if terms != 2:
        R = orthogonal.orthogonal(Q, terms)
        (saved,) = R.grad_fn.saved_tensors
        assert saved.data_ptr() == (R if terms is None else Q).data_ptr()


@pytest.mark.parametrize("x_grad", [True, False])
def test_rotating_equals_the_plain_formula(x_grad):
    with seeded(2):
        x, R = randn((2, ROWS // 2, 12), (3, 4, 4))
    values = x.detach().requires_grad_(x_grad), R
    agree(orthogonal.rotate, references.plain_rotate, values)
    dense = torch.block_diag(*R.detach())
    assert_close(orthogonal.rotate(*values).detach(), x.detach() @ dense)


def test_rotating_in_half_precision_errs_no_more():
    with seeded(2):
        x, R = randn((2, ROWS // 2, 12), (3, 4, 4))
    not_worse(orthogonal.rotate, references.plain_rotate, [x.detach().bfloat16().requires_grad_(), R])


# pairs of channels


def turns(dtype=torch.float32):
    with seeded(2):
        z, c, s = randn((2, ROWS // 2, 12), (3, 2, 2), (3, 2, 2))
    return z.detach().to(dtype).requires_grad_(), c, s


def test_turning_equals_the_plain_formula():
    values = turns()
    exact = agree(orthogonal.rotate_pairs, orthogonal.plain_rotate_pairs, values)
    with torch.no_grad():
        assert_close(orthogonal.rotate_pairs(*values).double(), exact[0], rtol=1e-5, atol=1e-6)
    z, c, s = wide(values)
    R = torch.diag(c.flatten().detach())
    for k in range(3):
        for j in range(2):
            first, second = 4 * k + j, 4 * k + 2 + j
            R[first, second], R[second, first] = s[k, 0, j].detach(), s[k, 1, j].detach()
    assert_close(exact[0], z.detach() @ R.T)


def test_turning_in_half_precision_errs_no_more():
    not_worse(orthogonal.rotate_pairs, orthogonal.plain_rotate_pairs, turns(torch.bfloat16))


# low rank, scaled by vectors


RANKS = [5, low_rank.KEPT_FROM]  # of which the second keeps a tensor of full width


def scaled(dtype=torch.float32, r=5, rows=ROWS):
    with seeded(3):
        y, h, d, b = randn((2, rows // 2, OUT), (2, rows // 2, r), (r,), (OUT,))
        (B,) = randn((OUT, r), grad=False)
    return y.detach().to(dtype).requires_grad_(), h, B, d, b


def fresh(function):
    return lambda y, *rest: function(y * 1, *rest)


@pytest.mark.parametrize("r", RANKS)
def test_adding_scaled_equals_the_plain_formula(r):
    values = scaled(r=r)
    agree(fresh(low_rank.add_scaled), low_rank.plain_scaled_low_rank, values)
    y, *rest = values
    base = y * 1
    assert low_rank.add_scaled(base, *rest).data_ptr() == base.data_ptr(), "in its memory"


@pytest.mark.parametrize("r", RANKS)
def test_adding_scaled_in_half_precision_errs_no_more(r):
    """In several blocks of rows."""
    values = scaled(torch.bfloat16, r, 2 * low_rank.BLOCK + 10)
    not_worse(fresh(low_rank.add_scaled), low_rank.plain_scaled_low_rank, values)
    small = [t.detach().mul(1e-6).requires_grad_() if n == 1 else t for n, t in enumerate(values)]
    not_worse(fresh(low_rank.add_scaled), low_rank.plain_scaled_low_rank, small)


@pytest.mark.parametrize("r", RANKS)
def test_what_adding_scaled_keeps(r):
    kept = []
    y, h, B, d, b = scaled(torch.bfloat16, r)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t.shape[-1], t.dtype)) or t, lambda t: t):
        low_rank.add_scaled(y * 1, h, B, d, b)
    assert ((OUT, torch.float16) in kept) == (r == low_rank.KEPT_FROM)


def test_sampling_hidden_values_equals_the_plain_formula():
    with seeded(3):
        h, d = randn((2, ROWS // 2, 10), (10,))
        (noise,) = randn((2, ROWS // 2, 5), grad=False)
    values = [h, d, noise]
    agree(low_rank.sample_hidden, low_rank.plain_sample_hidden, values)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        low_rank.sample_hidden(*values)
    assert sorted(kept) == sorted(t.numel() for t in values)


def input_gradient(g, W):
    return g @ W


@pytest.mark.parametrize("x_grad", [True, False])
def test_one_product_with_scaled_factors_equals_two(x_grad):
    with seeded(4):
        x, d, b = randn((2, ROWS // 2, IN), (5,), (OUT,))
        W, bias, A, B = randn((OUT, IN), (OUT,), (5, IN), (OUT, 5), grad=False)
    values = x.detach().requires_grad_(x_grad), d, b

    def one(x, d, b):
        fixed = (t.to(x.dtype) for t in (W, bias))
        factors = (t.to(x.dtype) for t in (A, B))
        return low_rank.linear_with(*fixed, x, *factors, d, b, nn.functional.linear, input_gradient)

    def two(x, d, b):
        w, s, a, c = (t.to(x.dtype) for t in (W, bias, A, B))
        return low_rank.plain_scaled_low_rank(nn.functional.linear(x, w, s), x @ a.T, c, d, b)

    exact = agree(one, two, values)
    assert len(exact) == 3 + x_grad


def test_one_product_needs_many_rows():
    assert low_rank.one_product_pays(1024, 576, 576)
    assert not low_rank.one_product_pays(1024, 4096, 4096)
    assert not low_rank.one_product_pays(1, 8, 8)


# Hadamard products


def test_narrow_factors_are_the_hadamard_product():
    with seeded(6):
        a, b, c, d = randn((OUT, 3), (3, IN), (OUT, 3), (3, IN))
    A, B = one_product.narrow(a, b, c, d)
    assert A.shape == (9, IN) and B.shape == (OUT, 9)
    assert_close(B @ A, one_product.plain_hadamard(a, b, c, d), rtol=1e-5, atol=1e-5)
    assert one_product.is_narrow(2, OUT, IN) and not one_product.is_narrow(3, OUT, IN)


def product(*factors):
    return one_product.Hadamard(*factors, SCALE, (factors[0].shape[0], factors[1].shape[1]))


@pytest.mark.parametrize("x_grad", [True, False])
def test_one_product_with_a_hadamard_product_equals_two(x_grad):
    with seeded(6):
        x, *factors = randn((2, ROWS // 2, IN), (OUT, 3), (3, IN), (OUT, 3), (3, IN))
        W, bias = randn((OUT, IN), (OUT,), grad=False)
    values = [x.detach().requires_grad_(x_grad), *factors]

    def one(x, *factors):
        fixed = (t.to(x.dtype) for t in (W, bias))
        return product(*factors).linear_with(*fixed, x, nn.functional.linear, input_gradient)

    def two(x, *factors):
        w, s = (t.to(x.dtype) for t in (W, bias))
        return nn.functional.linear(x, w, s) + SCALE * x @ one_product.plain_hadamard(*factors).T

    exact = agree(one, two, values)
    assert len(exact) == 5 + x_grad


# W ⊙ (B A)


def modulated_values(dtype=torch.float32, x_grad=True):
    with seeded(8):
        x, B, A = randn((2, ROWS // 2, IN), (OUT, 3), (3, IN))
        W, W0, bias = randn((OUT, IN), (OUT, IN), (OUT,), grad=False)
    fixed = [t.to(dtype) for t in (W, bias, W0)]
    return fixed, [x.detach().to(dtype).requires_grad_(x_grad), B, A]


def modulating(W, bias, W0):
    """In one product, and the reference."""

    def one(x, B, A):
        w, s, w0 = (t.to(x.dtype) for t in (W, bias, W0))
        return one_product.Modulated(w0, B, A).linear_with(w, s, x, nn.functional.linear, input_gradient)

    def two(x, B, A):
        w, s, wide_x, w0 = (t.to(A.dtype) for t in (W, bias, x, W0))
        return references.plain_linear_with(w, s, wide_x, w0 * (B @ A)).to(x.dtype)

    return one, two


@pytest.mark.parametrize("x_grad", [True, False])
def test_one_product_with_a_modulated_weight_equals_two(x_grad):
    fixed, values = modulated_values(x_grad=x_grad)
    one, two = modulating(*fixed)
    exact = agree(one, two, values)
    assert len(exact) == 3 + x_grad


def test_one_product_with_a_modulated_weight_takes_no_narrow_factors():
    fixed, values = modulated_values(torch.bfloat16)
    narrow = one_product.Modulated(fixed[2].float(), *(t.bfloat16() for t in values[1:]))
    assert narrow.linear_with(fixed[0].float(), None, values[0], nn.functional.linear, input_gradient) is None


def bfloat16_updates():
    """Kinds of ΔW in float32, each far below the steps of a weight in bfloat16: {kind: (fields → ΔW, its fields)}."""
    with seeded(8):
        (W0,) = randn((OUT, IN), dtype=torch.bfloat16, grad=False)
        B, A, D, C = randn((OUT, 3), (3, IN), (OUT, 3), (3, IN))
        places = torch.randperm(OUT * IN)[: OUT * IN // 12]
        v = torch.randn(len(places)).requires_grad_()
    B, D, v = ((t.detach() * 4e-4).requires_grad_() for t in (B, D, v))
    B0, A0 = D.detach(), C.detach()
    return W0, {
        "modulated": (lambda B, A: one_product.Modulated(W0, B, A), [B, A]),
        "with an addend": (lambda *t: one_product.Modulated(W0, *t), [B, A, D, C]),
        "in another layout": (lambda B, A: one_product.Modulated(W0.T.contiguous().T, B, A), [B, A]),
        "difference": (lambda B, A: Difference(B, A, B0.to(B.dtype), A0.to(A.dtype), (OUT, IN)), [B, A]),
        "scattered": (lambda v: Scattered(v, places, (OUT, IN)), [v]),
        "sorted": (lambda v: Scattered(v, places.sort().values, (OUT, IN)), [v]),
    }


@pytest.mark.parametrize(
    "kind", ["modulated", "with an addend", "in another layout", "difference", "scattered", "sorted"]
)
def test_an_update_below_the_steps_of_a_bfloat16_weight_acts(kind, rows=4800):
    """The output errs as if the product had been computed in float32 and rounded; with the sum rounded, ΔW is lost.
    The gradients err no more than with the rounded sum."""
    W0, updates = bfloat16_updates()
    make, fields = updates[kind]
    with seeded(4):
        (x,) = randn((2, rows // 2, IN), dtype=torch.bfloat16)

    def apart(x, *fields):
        return make(*fields).linear_with(W0.to(x.dtype), None, x, nn.functional.linear, input_gradient)

    def exact(x, *fields):
        return references.plain_linear_with(W0.to(fields[0].dtype), None, x, make(*fields).dense())

    def rounded(x, *fields):
        return nn.functional.linear(x, (W0 + make(*fields).dense()).to(x.dtype))

    def wide_output(x, *fields):
        return exact(x.to(fields[0].dtype), *fields).to(x.dtype)

    values = [x, *fields]
    expected = results(exact, wide(values))
    ours, plain, theirs = (errors(results(f, values), expected) for f in (apart, wide_output, rounded))
    assert ours[0] <= plain[0] * 1.03
    for a, b in zip(ours[1:], theirs[1:]):
        assert a <= b * 1.05, (ours, theirs)
    without = nn.functional.linear(x.double(), W0.double())
    update = expected[0] - without

    def acting(function):
        """The share of the update that is in the output, on average over the rows."""
        with torch.no_grad():
            return (((function(*values).double() - without) * update).sum() / update.square().sum()).item()

    assert abs(acting(apart) - 1) < 0.2 and acting(rounded) < 0.7, (acting(apart), acting(rounded))


@pytest.mark.parametrize("stored", ["(out, in)", "(in, out)"])
def test_a_modulated_weight_formed_and_by_columns(stored):
    _, (_, B, A) = modulated_values()
    with seeded(8):
        (W,) = randn((OUT, IN) if stored == "(out, in)" else (IN, OUT), grad=False)
        ids = torch.randint(IN, (2, 5))
    delta = one_product.Modulated(W if stored == "(out, in)" else W.T, B, A)
    dense = delta.dense()
    assert_close(dense, delta.W * (B @ A), rtol=1e-5, atol=1e-5)
    assert dense.stride() == delta.W.stride()
    assert_close(delta.columns(ids), dense.T[ids], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("merged", [False, True], ids=["plain", "merged"])
@pytest.mark.parametrize("out", [4 * IN, IN // 2], ids=["by factors", "by the sum"])
def test_a_product_that_replaces_the_weight(out, merged):
    with seeded(8):
        W0, W = randn((out, IN), (out, IN), grad=False)
        x, s, B, A = randn((2, ROWS, IN), (out,), (out, IN), (IN, IN))

    def one(x, s, B, A):
        w0 = W0.to(x.dtype)
        delta = one_product.Replacement(B, A, w0)
        w = W.to(x.dtype) if merged else w0
        return delta.linear_with(w, s, x, nn.functional.linear, input_gradient)

    def two(x, s, B, A):
        w, w0 = (t.to(x.dtype) for t in (W if merged else W0, W0))
        return references.plain_linear_with(w, s, x, B @ A - w0)

    agree(one, two, [x, s, B, A])
    delta = one_product.Replacement(B, A, W0)
    assert_close(delta.columns(torch.arange(IN)), delta.dense().T, rtol=1e-5, atol=1e-5)
    assert delta.linear_with(W0.bfloat16(), None, x.bfloat16(), nn.functional.linear, input_gradient) is None


@pytest.mark.parametrize(
    "out, r, rows", [(80, 40, 10), (80, 40, 200), (80, 20, 30), (20, 20, 50), (20, 4, 4), (30, 60, 30)]
)
def test_a_product_that_replaces_the_weight_takes_the_fewer_multiplications(out, r, rows):
    """In training of A and x: by the factors, or by the sum, whichever takes fewer."""
    with seeded(8):
        (W, B), (x, A) = randn((out, IN), (out, r), grad=False), randn((rows, IN), (r, IN))
    with FlopCounterMode(display=False) as counter:
        y = one_product.Replacement(B, A, W).linear_with(W, None, x, nn.functional.linear, input_gradient)
        y.sum().backward()
    by_factors, by_sum = rows * r * (2 * out + 3 * IN), out * IN * (3 * rows + 2 * r)
    assert counter.get_total_flops() == 2 * min(by_factors, by_sum)


def test_a_hadamard_product_by_columns():
    with seeded(6):
        factors = randn((OUT, 3), (3, IN), (OUT, 3), (3, IN))
        ids = torch.randint(IN, (2, 5))
    assert_close(product(*factors).columns(ids), product(*factors).dense().T[ids], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("x_grad", [True, False])
def test_one_product_with_a_modulated_weight_and_an_addend_equals_three(x_grad):
    (W, _, W0), (x, B, A) = modulated_values(x_grad=x_grad)
    with seeded(9):
        s, D, C = randn((OUT,), (OUT, 2), (2, IN))

    def one(x, s, *factors):
        w, w0 = (t.to(x.dtype) for t in (W, W0))
        return one_product.Modulated(w0, *factors).linear_with(w, s, x, nn.functional.linear, input_gradient)

    def three(x, s, B, A, D, C):
        return references.plain_linear_with(W.to(x.dtype), s, x, W0.to(x.dtype) * (B @ A) + D @ C)

    values = [x, s, B, A, D, C]
    exact = agree(one, three, values)
    assert len(exact) == 6 + x_grad
    delta = one_product.Modulated(W0, B, A, D, C)
    ids = torch.arange(IN).flip(0).view(2, -1)
    assert_close(delta.columns(ids), delta.dense().T[ids], rtol=1e-5, atol=1e-5)


# a ⊙ W + b


@pytest.mark.parametrize("shape", [(OUT, 1), (1,)], ids=["rows", "number"])
def test_a_rescaled_weight_in_one_product(shape):
    (W, _, _), (x, _, _) = modulated_values()
    with seeded(9):
        s, a, b = randn((OUT,), shape, shape)

    def one(x, s, a, b):
        w = W.to(x.dtype)
        return one_product.Rescaled(w, a, b).linear_with(w, s, x, nn.functional.linear, input_gradient)

    def reference(x, s, a, b):
        w = W.to(x.dtype)
        return references.plain_linear_with(w, s, x, a * w + b)

    values = [x, s, a, b]
    assert max(errors(results(one, values), results(reference, wide(values)))) < 1e-5
    delta = one_product.Rescaled(W, a, b)
    ids = torch.arange(IN).flip(0).view(2, -1)
    assert_close(delta.columns(ids), delta.dense().T[ids], rtol=1e-5, atol=1e-5)
    assert delta.linear_with(W.clone(), s, x, nn.functional.linear, input_gradient) is None


# a weight of a narrower dtype


@pytest.mark.parametrize("part", [1, 5 * OUT, 1 << 20])
def test_a_product_with_a_narrow_weight(part, monkeypatch):
    monkeypatch.setattr(narrow, "PART", part)
    with seeded(10):
        (A,), (W,) = randn((3, OUT)), randn((OUT, IN), grad=False)
    half = W.bfloat16()
    exact = results(lambda A: narrow.plain_widened_product(A, half), wide([A]))
    assert max(errors(results(lambda A: narrow.multiply_widened(A, half), [A]), exact)) < 1e-6
    assert torch.equal(narrow.multiply_widened(A, W), A @ W)


# derivatives


def test_first_and_second_derivatives():
    with seeded(7):
        x, u, v, R = randn((ROWS, 8), (8, 2), (2, 6), (2, 4, 4), dtype=torch.float64)
        d, b, *factors = randn((3,), (6,), (6, 2), (2, 8), (6, 2), (2, 8), dtype=torch.float64)
        c, s = randn((2, 2, 2), (2, 2, 2), dtype=torch.float64)
        W, A, B, y = randn((6, 8), (3, 8), (6, 3), (ROWS, 6), dtype=torch.float64, grad=False)
        r = low_rank.KEPT_FROM
        h, many, wide_B = randn((ROWS, r), (r,), (6, r), dtype=torch.float64)
    wide_B.requires_grad_(False)
    U, T = (t.detach().requires_grad_() for t in orthogonal.compact_reflections(u))
    linear = nn.functional.linear
    for function, values in (
        (orthogonal.reflect, (x, U, T)),
        (orthogonal.rotate, (x, R)),
        (orthogonal.rotate_pairs, (x, c, s)),
        (lambda Q: orthogonal.orthogonal(Q, 5), (orthogonal.skew(v * 0.1, 4),)),
        (lambda Q: orthogonal.orthogonal(Q, None), (orthogonal.skew(v * 0.1, 4),)),
        (lambda x, d, b: low_rank.add_scaled(y.clone(), x @ A.T, B, d, b), (x, d, b)),
        (lambda h, d, b: low_rank.add_scaled(y.clone(), h, wide_B, d, b), (h, many, b)),
        (lambda h, d: low_rank.sample_hidden(h, d, h.detach()[:, : len(d) // 2] * 0 + 0.3), (h, many)),
        (lambda x, d, b: low_rank.linear_with(W, None, x, A, B, d, b, linear, input_gradient), (x, d, b)),
        (lambda x, *f: product(*f).linear_with(W, None, x, linear, input_gradient), (x, *factors)),
        (
            lambda x, B, A: one_product.Modulated(2 * W, B, A).linear_with(W, None, x, linear, input_gradient),
            (x, *factors[:2]),
        ),
        (
            lambda x, *f: Difference(*f, *(t.detach() for t in factors[2:]), W.shape).linear_with(
                W, None, x, linear, input_gradient
            ),
            (x, *factors[:2]),
        ),
        (
            lambda x, *f: one_product.Replacement(*f, W).linear_with(W, None, x, linear, input_gradient),
            (x, *factors[:2]),
        ),
        (
            lambda x, v: Scattered(v, torch.tensor([1, 40, 17]), W.shape).linear_with(
                W, None, x, linear, input_gradient
            ),
            (x, d),
        ),
        (lambda x, A, B: linear_with(W, None, x, Factored(A, B, SCALE), linear, input_gradient), (x, *factors[1::-1])),
    ):
        values = [t.detach().requires_grad_() for t in values]
        assert torch.autograd.gradcheck(function, values, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, values, fast_mode=True)


# in a model


CONFIGS = {
    "IA3": lambda lib, **o: lib.IA3Config(**{"feedforward_modules": []} | o),
    "IA3-inner": lambda lib, **o: lib.IA3Config(**{"feedforward_modules": ["0", "2"]} | o),
    "VERA": lambda lib, **o: lib.VeraConfig(r=6, **o),
    "LOHA-narrow": lambda lib, **o: lib.LoHaConfig(r=2, alpha=2 * SCALE, **o),
    "LOHA-wide": lambda lib, **o: lib.LoHaConfig(r=5, alpha=5 * SCALE, **o),
    "OFT": lambda lib, **o: lib.OFTConfig(oft_block_size=4, **o),
    "OFT-constrained": lambda lib, **o: lib.OFTConfig(oft_block_size=4, coft=True, eps=0.5, **o),
    "HRA": lambda lib, **o: lib.HRAConfig(r=4, **o),
    "HIRA": lambda lib, **o: lib.HiraConfig(r=4, **o),
    "MISS": lambda lib, **o: lib.MissConfig(r=6, **o),
    "MISS-mini": lambda lib, **o: lib.MissConfig(r=6, mini_r=4, init_weights="mini", **o),
    "MISS-bat": lambda lib, **o: lib.MissConfig(r=4, init_weights="bat", **o),
    "VBLORA": lambda lib, **o: lib.VBLoRAConfig(r=3, num_vectors=9, vector_length=4, **o),
    "GRALORA": lambda lib, **o: lib.GraloraConfig(r=4, alpha=4 * SCALE, hybrid_r=2, **o),
    "DELORA": lambda lib, **o: lib.DeloraConfig(r=4, delora_lambda=2, **o),
    "C3A": lambda lib, **o: lib.C3AConfig(block_size=4, **o),
    "FOURIERFT": lambda lib, **o: lib.FourierFTConfig(n_frequency=70, scaling=40 * SCALE, **o),
    "WAVEFT": lambda lib, **o: lib.WaveFTConfig(n_frequency=70, scaling=SCALE, **o),
    "LOKR": lambda lib, **o: lib.LoKrConfig(r=2, alpha=2 * SCALE, **o),
    "ROAD": lambda lib, **o: lib.RoadConfig(group_size=4, **o),
    "ROAD-4": lambda lib, **o: lib.RoadConfig(group_size=4, variant="road_4", **o),
    "ADALORA": lambda lib, **o: lib.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=4 * SCALE, total_step=9, **o),
    "GLORA": lambda lib, **o: lib.GloraConfig(r=4, **o),
    "GLORA-vector": lambda lib, **o: lib.GloraConfig(config_A_B="vector", config_C="vector", config_D_E="vector", **o),
    "GLORA-constant": lambda lib, **o: lib.GloraConfig(config_A_B="constant", config_C="none", **o),
    "PEANUT": lambda lib, **o: lib.PeanutConfig(r=4, depth=1, act_fn="tanh", scaling=SCALE, **o),
}
ALL = list(CONFIGS)
# gradients of few numbers, in which either form may be luckier
FEW = ("GLORA", "GLORA-vector", "GLORA-constant", "PEANUT", "DELORA")
# one of each kind of product; of the others, `make test-slow` compiles each
GRAPHS = ("VERA", "LOHA-narrow", "OFT", "HIRA", "MISS", "C3A", "LOKR", "GLORA")
every = pytest.mark.parametrize("name", ALL)


def base(dtype=torch.float32, conv1d=False, bias=True):
    from transformers.pytorch_utils import Conv1D

    def linear(n, out):
        if not conv1d:
            return nn.Linear(n, out, bias=bias)
        made = Conv1D(out, n)
        nn.init.normal_(made.weight, std=0.2)
        nn.init.normal_(made.bias, std=0.2)
        return made

    with seeded(0):
        return nn.Sequential(linear(IN, OUT), nn.Tanh(), linear(OUT, 32)).to(dtype)


@torch.no_grad()
def disturb(made):
    with seeded(3):
        for name, p in made.named_parameters():
            if p.requires_grad and "base_layer" not in name:
                p.add_(torch.randn(p.shape).to(p.dtype), alpha=0.2)
    return made


def model(name, lib=graft, dtype=torch.float32, conv1d=False, bias=True, **options):
    with seeded(9):
        config = CONFIGS[name](lib, target_modules=["0", "2"], **options)
        made = lib.get_peft_model(base(dtype, conv1d, bias), config)
    return disturb(made)


def inputs(rows=ROWS, dtype=torch.float32):
    with seeded(2):
        return torch.randn(rows, IN).to(dtype)


def outcome(made, x, function=None):
    """The output, and gradients of the adapters and of x."""
    x = x.detach().requires_grad_()
    made.zero_grad()
    y = made(x) if function is None else function(x)
    with seeded(5):
        weights = torch.randn(y.shape)
    (y.to(weights.dtype) * weights).sum().backward()
    grads = {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad} | grads


def close(found, exact, tolerance=3e-6):
    assert found.keys() == exact.keys()
    for name, t in exact.items():
        error = ((found[name].double() - t).norm() / t.norm()).item()
        assert error < tolerance, (name, error)


def folded(made, x):
    """The model by its effective weights, in float64: nothing but `fold`."""
    for layer in (made.base_model.model[0], None, made.base_model.model[2]):
        if layer is None:
            x = torch.tanh(x)
            continue
        W, b = layer.op.canon(layer.base_layer.weight), layer.base_layer.bias
        if layer.state.plan is not None:
            W, b = layer.state.plan.fold(W, b)
        x = nn.functional.linear(x, W, b)
    return x


def exactly(made, x):
    """What `outcome` should be."""
    double = copy.deepcopy(made).double()
    return outcome(double, x.double(), lambda x: folded(double, x))


@every
@pytest.mark.parametrize("conv1d", [False, True], ids=["linear", "Conv1D"])
@pytest.mark.parametrize("rows", [4, ROWS])
def test_forward_and_gradients_are_those_of_the_folded_weight(name, conv1d, rows):
    made = model(name, conv1d=conv1d)
    exact = exactly(made, inputs(rows))
    assert len(exact) > 3
    close(outcome(made, inputs(rows)), exact, 3e-5 if name in FEW else 3e-6)
    with torch.no_grad():
        assert_close(made(inputs(rows)).double(), exact["y"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["VERA", "LOHA-narrow", "LOHA-wide", "ADALORA", "HIRA", "VBLORA", "GLORA", "PEANUT"])
def test_the_fused_form_runs_where_it_should(name, monkeypatch):
    """The tests above would pass without it."""
    owner, fused = {
        "VERA": (fused_forms, "linear_with"),
        "LOHA-wide": (one_product.Hadamard, "linear_with"),
        "HIRA": (one_product.Modulated, "linear_with"),
        "GLORA": (one_product.Modulated, "linear_with"),
    }.get(name, (fused_forms, "low_rank_linear"))
    calls = []
    real = getattr(owner, fused)
    monkeypatch.setattr(owner, fused, lambda *args: calls.append(1) or real(*args))
    made = model(name)
    made(inputs(4))
    with torch.no_grad():
        made(inputs())
    assert not calls  # of few rows, and without gradients, other kernels serve
    made(inputs())
    assert len(calls) == 2


@pytest.mark.parametrize("name", [n for n in ALL if n != "C3A"])  # whose gradient PEFT gets wrong
def test_gradients_equal_pefts(name):
    ours, theirs = model(name), model(name, peft)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    assert {n for n, p in ours.named_parameters()} == {n for n, p in theirs.named_parameters()}
    close(outcome(ours, inputs()), outcome(theirs, inputs()), 1e-5)


@pytest.mark.parametrize("name", [n for n in ALL if n != "DELORA"])  # the error of one number, λ, is chance
def test_a_half_precision_base_errs_no_more_than_the_plain_form(name, monkeypatch):
    made = model(name, dtype=torch.bfloat16)
    x = inputs(dtype=torch.bfloat16)
    exact = exactly(made, x)
    fused = outcome(made, x)
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)  # as `eager` asks
    assert not worth_it(x)
    plain = outcome(made, x)
    assert fused["y"].dtype == torch.bfloat16
    own, others = ([((r[n].double() - t).norm() / t.norm()).item() for n, t in exact.items()] for r in (fused, plain))
    if name in FEW:
        assert max(own) < 0.03, own
        return
    more = 1.4 if name == "HIRA" else 1.05  # its gradients come through that of ΔW, which is rounded as a weight's
    assert max(own) < 0.01 and all(a <= b * more for a, b in zip(own, others)), (own, others)


@pytest.mark.parametrize("name", [n for n in ALL if n != "ADALORA"])  # of which one trains at a time
def test_two_active_adapters(name):
    made = model(name)
    made.add_adapter("other", CONFIGS[name](graft, target_modules=["0", "2"]))
    made.base_model.set_adapter(["default", "other"])
    disturb(made)
    exact = exactly(made, inputs())
    assert any(".other" in key for key in exact)
    close(outcome(made, inputs()), exact, 1e-5)


@law(
    "name, rows",
    [Case((name, rows)) for name in ALL for rows in (4, ROWS)],
    lambda case: [*{case[0]}.intersection(GRAPHS), case[1]],
    (lambda case: [case[0]], pytest.mark.slow),
)
def test_compiles_as_one_graph(name, rows):
    torch._dynamo.reset()
    made = model(name)
    expected = outcome(made, inputs(rows))
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    close(outcome(made, inputs(rows), compiled), expected, 1e-5)


@every
def test_functional_transforms(name):
    made = model(name)
    expected = outcome(made, inputs())
    parameters = {n: p.detach() for n, p in made.named_parameters() if n in expected}
    with seeded(5):
        weights = torch.randn(ROWS, 32)

    def loss(parameters):
        return (torch.func.functional_call(made, parameters, (inputs(),)) * weights).sum()

    found = torch.func.grad(loss)(parameters)
    close(found, {n: expected[n] for n in parameters}, 1e-5)


@every
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(name, reentrant):
    made = model(name)
    expected = outcome(made, inputs())
    inner = made.base_model.model
    close(outcome(made, inputs(), lambda x: checkpoint(inner, x, use_reentrant=reentrant)), expected, 1e-6)


@every
def test_a_base_bias_that_trains_gets_its_gradient(name):
    made = model(name)
    for layer in (made.base_model.model[0], made.base_model.model[2]):
        layer.base_layer.bias.requires_grad_()
    exact = exactly(made, inputs())
    assert sum("base_layer.bias" in key for key in exact) == 2
    close(outcome(made, inputs()), exact)


@every
def test_a_base_weight_that_trains_gets_its_gradient(name):
    made = model(name)
    made.base_model.model[0].base_layer.weight.requires_grad_()
    exact = exactly(made, inputs())
    assert any("base_layer.weight" in key for key in exact)
    close(outcome(made, inputs()), exact)


@pytest.mark.parametrize("name", [n for n in ALL if n != "MISS-bat"])  # whose weight is folded
def test_a_hook_on_the_base_layer_is_called(name):
    made = model(name)
    layer, seen = made.base_model.model[0], []
    expected = outcome(made, inputs())
    layer.base_layer.register_forward_hook(lambda _m, x, y: seen.append((x[0], y)))
    close(outcome(made, inputs()), expected, 1e-5)
    ((x, y),) = seen
    assert torch.equal(y, nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias))


@every
def test_autocast(name):
    made = model(name)
    expected = exactly(made, inputs())
    with torch.autocast("cpu", torch.bfloat16):
        found = outcome(made, inputs())
    assert found["y"].dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for key, t in found.items() if key != "y")
    close(found, expected, 0.05)


@every
def test_a_mixed_batch_equals_its_rows(name):
    made = model(name)
    other = {"inference_mode": True} if name == "ADALORA" else {}
    made.add_adapter("other", CONFIGS[name](graft, target_modules=["0", "2"], **other))
    with torch.no_grad(), seeded(8):
        for key, p in made.named_parameters():
            if ".other" in key:
                p.add_(torch.randn(p.shape), alpha=0.2)
    names = ["other", "__base__", "default", "other"]
    with seeded(2):
        x = torch.randn(4, ROWS, IN)
    mixed = made(x, adapter_names=names)
    for i, adapter in enumerate(names):
        assert_close(mixed[i : i + 1], made(x[i : i + 1], adapter_names=[adapter]), rtol=1e-5, atol=1e-5)
    assert (mixed - made(x, adapter_names=["__base__"] * 4)).abs().amax((1, 2)).min() == 0
    made.set_adapter("default")
    assert_close(mixed[2], made(x[2]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["VERA", "ADALORA"])
@pytest.mark.parametrize("rows", [4, ROWS])
def test_dropout_is_the_same_in_both_directions(name, rows):
    p = {"VERA": "vera_dropout", "ADALORA": "lora_dropout"}[name]
    made = model(name, **{p: 0.4}).train()
    first = made.base_model.model[0]
    assert find_dropout_rate(first.methods["default"].layer._modules[p]["default"]) == 0.4
    x = inputs(rows).requires_grad_()
    with seeded(4):
        y = first(x)
    with seeded(4):
        again = first(x)
    assert torch.equal(y, again)
    m = first.methods["default"]
    with seeded(5):
        weights = torch.randn(y.shape)
    dx = torch.autograd.grad((y * weights).sum(), x, retain_graph=True)[0] - weights @ first.base_layer.weight
    A, B = m.factors().matrices()
    full = weights @ (B @ A)
    share = dx / full  # 0 where dropped, 1 / (1 - p) elsewhere
    dropped = share.abs() < 1e-2
    assert 0.2 < dropped.float().mean() < 0.6
    assert_close(share[~dropped], torch.full_like(share[~dropped], 1 / 0.6), rtol=1e-2, atol=1e-2)
    mask = (~dropped).float() / 0.6
    assert_close(y, first.base_layer(x) + (x * mask) @ (B @ A).T, rtol=1e-4, atol=1e-4)
    made.eval()
    assert find_dropout_rate(getattr(first, p)["default"]) == 0


def test_a_foreign_dropout_is_called():
    class Louder(nn.Module):
        def forward(self, x):
            return x * 3

    assert find_dropout_rate(Louder()) is None
    for name, p in (("VERA", "vera_dropout"), ("ADALORA", "lora_dropout")):
        made = model(name)
        layer = made.base_model.model[0]
        x = inputs()
        y, plain = layer(x), layer.base_layer(x)
        getattr(layer, p)["default"] = Louder()
        assert_close(layer(x) - plain, 3 * (y - plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["LOHA-narrow", "LOHA-wide"])
def test_rank_dropout_takes_out_rows(name):
    made = model(name, rank_dropout=0.4).train()
    layer = made.base_model.model[0]
    x = inputs()
    with seeded(4):
        y = layer(x)
    with seeded(4):
        keep = (torch.rand(OUT) > 0.4).float()
    assert 0 < keep.sum() < OUT
    W = layer.base_layer.weight + layer.get_delta_weight("default") * (keep / keep.mean())[:, None]
    assert_close(y, nn.functional.linear(x, W, layer.base_layer.bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(12, 28, 3, padding=1), lambda: nn.Embedding(50, 30)])
def test_narrow_loha_on_other_layers(make):
    with seeded(1):
        layer = graft.get_peft_model(
            nn.Sequential(make()), graft.LoHaConfig(r=2, alpha=2 * SCALE, target_modules=["0"])
        )
        disturb(layer)
        inner = layer.base_model.model[0]
        x = torch.randint(50, (3, 7)) if inner.op.takes_ids else torch.randn(3, 12, 5, 4)
    assert inner.methods["default"].effect.product is not None
    y = layer(x)
    layer.merge_adapter()
    assert_close(layer(x), y, rtol=1e-5, atol=1e-5)


def kept(layer, x):
    """Bytes kept for backward beside parameters, buffers and x itself."""
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers(), x)}
    seen = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    return sum(seen.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name, numbers",
    [
        ("VERA", ROWS * 6),  # x Aᵀ
        ("LOHA-narrow", 4 * (IN + OUT + ROWS)),  # factors of rank r², and x Aᵀ
        ("OFT", 2 * IN * 4),  # Q and R
        ("HRA", IN * 4 + ROWS * 4),  # U and x U; less than the many small ones below
        ("ADALORA", 4 * IN + ROWS * 4),  # A scaled, and x Aᵀ
        ("HIRA", 0),
        ("MISS", ROWS * 6),  # the sums of shards
    ],
)
def test_bytes_kept_for_backward(name, numbers, dtype):
    """x as it came, and little else: no copy of it in another dtype, no output, no dense weight."""
    layer = model(name, dtype=dtype).base_model.model[0]
    x = inputs(dtype=dtype)
    small = 4 * 3 * (IN + 200)  # norms, T and the like
    assert numbers * 4 <= kept(layer, x) <= numbers * 4 + small < ROWS * IN * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_turning_keeps_the_output_of_the_base_layer_as_it_came(dtype):
    layer = model("ROAD", dtype=dtype).base_model.model[0]
    z = ROWS * OUT * dtype.itemsize
    assert z <= kept(layer, inputs(dtype=dtype)) < z + 4 * 10 * OUT
