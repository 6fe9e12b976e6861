# SPDX-License-Identifier: Apache-2.0
"""The fused low-rank update and DoRA's norm against plain formulas, in values, gradients and memory."""

import copy

import peft
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import graft
from graft.core import fused
from graft.kernels import decomposed, low_rank, mixed, sparse
from graft.kernels.decomposed import row_norms
from graft.kernels.low_rank import FUSED_FROM, add_low_rank, dropout, dropout_mask, dropped, plain
from tests.kernels import references
from tests.models import seeded

SCALE = 1.37
ROWS = FUSED_FROM + 6


def tensors(dtype=torch.float32, adapter=torch.float32, rows=ROWS, x_grad=True):
    with seeded(1):
        y = torch.randn(2, rows // 2, 20).to(dtype).requires_grad_()
        x = torch.randn(2, rows // 2, 12).to(dtype).requires_grad_(x_grad)
        A, B = (torch.randn(s).to(adapter).requires_grad_() for s in ((3, 12), (20, 3)))
    return y, x, A, B


def wide(values):
    return [t.detach().double().requires_grad_(t.requires_grad) for t in values]


def results(function, values, **options):
    """Output and gradients for a loss with different weights everywhere."""
    y, x, A, B = values
    out = function(y * 1, x, A, B, SCALE, **options)
    with seeded(5):
        weights = torch.randn(out.shape)
    given = [t for t in values if t.requires_grad]
    grads = torch.autograd.grad((out.to(weights.dtype) * weights).sum(), given)
    return [out.detach(), *grads]


def spread(found, exact) -> list[float]:
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact)]


def worst(found, exact) -> list[float]:
    return [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, exact)]


@pytest.mark.parametrize("x_grad", [True, False])
@pytest.mark.parametrize("rows", [4, ROWS])
def test_equals_the_plain_formula(rows, x_grad):
    values = tensors(rows=rows, x_grad=x_grad)
    exact = results(plain, wide(values))
    assert max(worst(results(add_low_rank, values), exact)) < 1e-6
    assert len(exact) == 4 + x_grad


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_half_precision_errs_no_more_than_the_plain_formula(adapter):
    values = tensors(torch.bfloat16, adapter)
    exact = results(plain, wide(values))
    fused, unfused = (spread(results(f, values), exact) for f in (add_low_rank, plain))
    assert all(a <= b * 1.02 for a, b in zip(fused, unfused)), (fused, unfused)
    assert fused[0] < 2**-7


@pytest.mark.parametrize("trains", [True, False])
def test_a_fixed_up_projection_keeps_nothing_of_the_input(trains):
    y, h, B = torch.randn(ROWS, 20), torch.randn(ROWS, 3).requires_grad_(), torch.randn(20, 3).requires_grad_(trains)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        out = low_rank.add_product(y.clone(), h, B, SCALE)
    weights = torch.randn(out.shape)
    (dh,) = torch.autograd.grad((out * weights).sum(), [h], retain_graph=True)
    assert_close(out, y + SCALE * h @ B.T)
    assert_close(dh, SCALE * weights @ B)
    assert (h.data_ptr() in kept) == trains
    if trains:
        (dB,) = torch.autograd.grad((out * weights).sum(), [B])
        assert_close(dB, SCALE * weights.T @ h)


def test_autocast_computes_in_its_dtype():
    values = tensors()
    exact = results(plain, wide(values))
    with torch.autocast("cpu", torch.bfloat16):
        found = results(add_low_rank, values)
    assert [t.dtype for t in found] == [torch.float32] * 5
    assert 1e-4 < max(worst(found, exact)) < 0.03


@pytest.mark.parametrize("rows", [4, ROWS])
def test_autocast_without_gradients(rows):
    made = model()
    with torch.autocast("cpu", torch.bfloat16):
        expected = made(inputs(rows)).detach()
        with torch.no_grad():
            found = made(inputs(rows))
    assert found.dtype == expected.dtype == torch.bfloat16
    assert worst([found], [expected.double()]) < [2**-6]


def test_without_gradients_y_is_overwritten():
    y, x, A, B = (t.detach() for t in tensors())
    expected = plain(y, x, A, B, SCALE)
    out = add_low_rank(y, x, A, B, SCALE)
    assert out.data_ptr() == y.data_ptr()
    assert_close(out, expected)


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_dropout_is_the_same_in_both_directions(p, monkeypatch):
    values = tensors()
    monkeypatch.setattr(low_rank, "new_seed", lambda: 11)
    found = results(add_low_rank, values, p=p)
    flat = torch.empty(ROWS // 2 * 2, 12)
    mask = dropout_mask(flat, p, 11).view(2, -1, 12) / (1 - p)
    assert 0 < (mask == 0).float().mean() < 2 * p

    def masked(y, x, A, B, scale):
        return plain(y, x * mask, A, B, scale)

    assert max(worst(found, results(masked, wide(values)))) < 1e-6


def test_dropout_keeps_the_share_that_it_should():
    x = torch.ones(1000, 300)
    for p in (0.0625, 0.1, 0.5, 0.9):
        out = dropped(x, p, 3)
        assert abs((out == 0).float().mean().item() - p) < 0.005
        assert_close(out.mean().item(), 1.0, rtol=0.02, atol=0)
        assert torch.equal(out, dropped(x, p, 3)) and not torch.equal(out, dropped(x, p, 4))
    x = torch.ones(ROWS, 9, requires_grad=True)
    out = dropout(x, 0.3)
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())


def test_seeds_come_from_the_global_generator():
    values = tensors()
    with seeded(4):
        first = add_low_rank(*values, SCALE, 0.5).detach().clone()
    values = tensors()
    with seeded(4):
        second = add_low_rank(*values, SCALE, 0.5)
    assert torch.equal(first, second)


def test_second_derivatives():
    y, x, A, B = (t.detach().double().requires_grad_() for t in tensors())

    def once(x, A, B):
        return add_low_rank(y.detach().clone(), x, A, B, SCALE)

    assert torch.autograd.gradgradcheck(once, (x, A, B), fast_mode=True)


# with the base layer


def drawn(dtype=torch.float32, bias=True, x_grad=True):
    """x, W, b, A, B, ratio of a linear layer from 12 to 20."""
    with seeded(3):
        x = torch.randn(2, ROWS // 2, 12).to(dtype).requires_grad_(x_grad)
        W, b = torch.randn(20, 12).to(dtype), torch.randn(20).to(dtype) if bias else None
        A, B, ratio = (torch.randn(s).requires_grad_() for s in ((3, 12), (20, 3), (20,)))
    return x, W, b, A, B, ratio


def called(values, function):
    """Output of function(x, W, b, A, B, ratio) and its gradients."""
    out = function(*values)
    with seeded(5):
        weights = torch.randn(out.shape)
    given = [t for t in values if t is not None and t.requires_grad]
    return [out.detach(), *torch.autograd.grad((out.to(weights.dtype) * weights).sum(), given, allow_unused=True)]


def doubled(values):
    return [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in values]


def input_gradient(g, W):
    return g @ W


def joint(p=0.0):
    def run(x, W, b, A, B, _):
        return low_rank.low_rank_linear(lambda x: nn.functional.linear(x, W, b), input_gradient, W, x, A, B, SCALE, p)

    return run


def dora(p=0.0):
    def run(x, W, b, A, B, ratio):
        def base(x):
            return nn.functional.linear(x, W, b)

        return decomposed.dora_linear(base, input_gradient, x, W, b, A, B, ratio, SCALE, p)

    return run


def masked(function, p, seed):
    """The plain form of either, with the mask that dropout draws from the seed."""
    mask = dropout_mask(torch.empty(ROWS // 2 * 2, 12), p, seed).view(2, -1, 12) / (1 - p) if p else 1

    def run(x, W, b, A, B, ratio):
        if function is dora:
            return decomposed.plain_dora_linear(x, W, b, A, B, ratio, SCALE, mask)
        return plain(nn.functional.linear(x, W, b), x * mask, A, B, SCALE)

    return run


@pytest.mark.parametrize("function", [joint, dora])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("x_grad", [True, False])
def test_base_and_adapter_in_one_function(function, p, bias, x_grad, monkeypatch):
    monkeypatch.setattr(low_rank, "new_seed", lambda: 11)
    values = drawn(bias=bias, x_grad=x_grad)
    exact = called(doubled(values), masked(function, p, 11))
    found = called(values, function(p))
    pairs = [(a, b) for a, b in zip(found, exact) if b is not None]
    assert len(pairs) == 3 + x_grad + (function is dora)
    assert max(worst(*zip(*pairs))) < 3e-6


@pytest.mark.parametrize("function", [joint, dora])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_base_and_adapter_in_half_precision(function, p, monkeypatch):
    """No further from the exact result than operations one by one, which round the output of the base layer, too."""
    monkeypatch.setattr(low_rank, "new_seed", lambda: 11)
    values = drawn(torch.bfloat16)
    exact = called(doubled(values), masked(function, p, 11))
    mask = dropout_mask(torch.empty(ROWS // 2 * 2, 12), p, 11).view(2, -1, 12) / (1 - p) if p else 1

    def one_by_one(x, W, b, A, B, ratio):
        y, xd = nn.functional.linear(x, W, b), (x * mask).to(x.dtype)
        added = (xd.float() @ A.T @ B.T) * SCALE
        if function is joint:
            return (y + added).to(y.dtype)
        return (y + nn.functional.linear(xd, W) * (ratio - 1) + added * ratio).to(y.dtype)

    found, unfused = (called(values, f) for f in (function(p), one_by_one))
    pairs = [(a, b, c) for a, b, c in zip(found, unfused, exact) if c is not None]
    found, unfused, exact = zip(*pairs)
    errors = list(zip(spread(found, exact), spread(unfused, exact)))
    assert all(a <= b * 1.05 for a, b in errors), errors


@pytest.mark.parametrize("function", [joint, dora])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.4])
def test_second_derivatives_with_the_base_layer(function, p, monkeypatch):
    monkeypatch.setattr(low_rank, "new_seed", lambda: 11)
    x, W, b, A, B, ratio = doubled(drawn())

    def once(x, A, B, ratio):
        return function(p)(x, W, b, A, B, ratio) + 0 * ratio

    assert torch.autograd.gradgradcheck(once, (x, A, B, ratio), fast_mode=True)


def test_products_of_few_elements():
    with seeded(9):
        x, W, g = torch.randn(30, 12).double(), torch.randn(20, 12).double(), torch.randn(30, 20).double()
    for p in (0.001, 0.05, 0.5):
        found = low_rank.places(x.numel(), p, 5, x.device)
        assert_close(sparse.multiply_sampled(x, W, found), references.plain_multiply_sampled(x, W, found))
        assert_close(sparse.product_entries(g, W, found), sparse.plain_product_entries(g, W, found))
    half = (
        sparse.multiply_sampled(x.bfloat16(), W.bfloat16(), found),
        sparse.product_entries(g.bfloat16(), W.bfloat16(), found),
    )
    assert [t.dtype for t in half] == [torch.float32] * 2


@pytest.mark.parametrize("p", [0.003, 0.05, 0.5, 0.95])
def test_places_are_independent_draws(p):
    """Every place is as likely as any other, and neighbours do not know of each other."""
    size, seeds = 400, 4000
    drops = torch.zeros(seeds, size)
    for seed in range(seeds):
        found = low_rank.places(size, p, seed, drops.device)
        assert (found.diff() > 0).all() and ((found >= 0) & (found < size)).all()
        drops[seed, found] = 1
    share, sigma = drops.mean(0), (p * (1 - p) / seeds) ** 0.5
    assert ((share - p).abs() < 5 * sigma).all()
    both = (drops[:, 1:] * drops[:, :-1]).mean()
    assert (both - p * p).abs() < 6 * p / (seeds * size) ** 0.5


# in a model


def model(dropout=0.0, dora=False, bias=True, dtype=torch.float32, **options):
    with seeded(0):
        base = nn.Sequential(nn.Linear(12, 20, bias=bias), nn.Tanh(), nn.Linear(20, 6, bias=bias)).to(dtype)
        config = graft.LoraConfig(
            r=3, lora_alpha=3 * SCALE, target_modules=["0", "2"], lora_dropout=dropout, use_dora=dora, **options
        )
        made = graft.get_peft_model(base, config)
        made.add_adapter("other", copy.deepcopy(config))
        for name, p in made.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                nn.init.normal_(p, std=0.4)
            elif "magnitude" in name:
                p.data.mul_(1.3)
    made.base_model.set_adapter(["default", "other"])
    return made


def gradients(made, x):
    made.zero_grad()
    made(x).float().square().sum().backward()
    return {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}


def inputs(rows=ROWS, dtype=torch.float32):
    with seeded(2):
        return torch.randn(rows, 12).to(dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dora", [True, False])
def test_two_active_adapters(dora, bias, monkeypatch):
    made = model(dora=dora, bias=bias)
    fused, y = gradients(made, inputs()), made(inputs()).detach()
    with torch.no_grad():
        assert_close(made(inputs()), y)
    monkeypatch.setattr("graft.core.layer.eager", lambda: False)
    assert_close(made(inputs()), y, rtol=1e-5, atol=1e-5)
    unfused = gradients(made, inputs())
    assert fused.keys() == unfused.keys() and len(fused) == (12 if dora else 8)
    for name in fused:
        assert_close(fused[name], unfused[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dora", [True, False])
def test_gradient_checkpointing(dora, reentrant):
    made = model(dropout=0.2, dora=dora)
    x = inputs().requires_grad_()
    with seeded(3):
        expected = gradients(made, x)
    inner = made.base_model.model
    with seeded(3):
        made.zero_grad()
        checkpoint(inner, x, use_reentrant=reentrant).square().sum().backward()
    found = {n: p.grad for n, p in made.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name in found:
        assert_close(found[name], expected[name])


def test_a_hook_on_the_base_layer_sees_the_base_output():
    made = model()
    layer = made.base_model.model[0]
    seen = []
    layer.base_layer.register_forward_hook(lambda _m, _x, y: seen.append(y))
    made(inputs())
    assert torch.equal(seen[0], layer.base_layer(inputs()))


def test_a_hook_on_a_factor_is_called():
    made = model()
    calls = []
    made.base_model.model[0].lora_A["default"].register_forward_pre_hook(lambda *_: calls.append(1))
    made(inputs())
    assert calls == [1]


@pytest.mark.parametrize(
    ("dora", "rows"),
    [(True, ROWS), (False, 4), *(pytest.param(*c, marks=pytest.mark.slow) for c in ((True, 4), (False, ROWS)))],
)
def test_compiles_as_one_graph(dora, rows):
    made = model(dora=dora)
    expected = gradients(made, inputs(rows))
    made_too = model(dora=dora)
    compiled = torch.compile(made_too, fullgraph=True, backend="aot_eager")
    compiled(inputs(rows)).square().sum().backward()
    for name, p in made_too.named_parameters():
        if p.grad is not None:
            assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_functional_transforms():
    made = model()
    parameters = {n: p.detach() for n, p in made.named_parameters() if "lora_" in n}

    def loss(parameters):
        return torch.func.functional_call(made, parameters, (inputs(),)).square().sum()

    found = torch.func.grad(loss)(parameters)
    for name, g in gradients(made, inputs()).items():
        assert_close(found[name], g, rtol=1e-4, atol=1e-4)


def test_bytes_kept_for_backward():
    """x, once, in its own dtype; h of r numbers per row; neither a mask nor a copy."""
    kept_bytes = {}
    for p in (0.0, 0.3):
        layer = model(dropout=p, dtype=torch.bfloat16).base_model.model[0]
        layer.set_adapter("default")
        x = inputs(dtype=torch.bfloat16)
        own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), x)}
        seen = {}

        def pack(t, own=own, seen=seen):
            if t.untyped_storage().data_ptr() not in own:
                seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(x)
        kept_bytes[p] = sum(seen.values())
    assert kept_bytes == {0.0: ROWS * 3 * 4, 0.3: ROWS * 3 * 4}


def test_a_weight_that_trains_gets_its_gradient():
    for dora in (True, False):
        made = model(dora=dora)
        layer = made.base_model.model[0]
        layer.set_adapter("default")
        weight, x = layer.base_layer.weight.requires_grad_(), inputs()
        layer(x).square().sum().backward()
        found = weight.grad
        m = layer.methods["default"]
        A, B = (f.detach() for f in m.factors().matrices())
        W = weight.detach().clone().requires_grad_()
        y = nn.functional.linear(x, W, layer.base_layer.bias) if not dora else None
        if dora:
            out = decomposed.plain_dora_linear(x, W, layer.bias, A, B, m.factors().gain.detach(), 1.0)
        else:
            out = y + x @ A.T @ B.T
        out.square().sum().backward()
        assert_close(found, W.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dora", [True, False])
def test_backward_hooks_of_the_base_layer_are_called(dora):
    made = model(dora=dora)
    layer = made.base_model.model[0]
    seen = []
    layer.base_layer.register_full_backward_hook(lambda _m, _gx, gy: seen.append(gy[0]))
    made(inputs().requires_grad_()).sum().backward()
    assert len(seen) == 1 and seen[0].shape == (ROWS, 20)


# against PEFT


def pair(dora=False, dtype=torch.float32, **options):
    """graft's and PEFT's model with the same values, both adapters active."""
    ours = model(dora=dora, dtype=dtype, **options)
    with seeded(0):
        base = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6)).to(dtype)
    config = peft.LoraConfig(r=3, lora_alpha=3 * SCALE, target_modules=["0", "2"], use_dora=dora, **options)
    theirs = peft.get_peft_model(base, config)
    theirs.add_adapter("other", copy.deepcopy(config))
    theirs.base_model.set_adapter(["default", "other"])
    values = {n: p.detach() for n, p in ours.named_parameters()}
    assert values.keys() == dict(theirs.named_parameters()).keys()
    theirs.load_state_dict(values, strict=False)
    return ours, theirs


HOW = ["plain", "half", "autocast", "checkpoint", "frozen input", "no grad"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.parametrize("adapters", [["default"], ["default", "other"]])
@pytest.mark.parametrize("rows", [4, ROWS])
def test_equals_peft(how, dora, adapters, rows):
    dtype = torch.bfloat16 if how == "half" else torch.float32
    found = []
    for made in pair(dora, dtype):
        made.base_model.set_adapter(adapters)
        x = inputs(rows, dtype).requires_grad_(how != "frozen input")
        low = torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast")
        with low, torch.set_grad_enabled(how != "no grad"):
            inner = made.base_model.model
            y = checkpoint(inner, x, use_reentrant=False) if how == "checkpoint" else made(x)
        values = {"y": y.detach().float()}
        if how != "no grad":
            y.float().square().sum().backward()
            values |= {n: p.grad for n, p in made.named_parameters() if p.grad is not None}
            values |= {"x": x.grad.float()} if x.requires_grad else {}
        found.append(values)
    ours, theirs = found
    assert ours.keys() == theirs.keys() and len(ours) > (4 if how != "no grad" else 0)
    loose = how in ("half", "autocast")
    for name in ours:
        a, b = ours[name], theirs[name]
        assert (a - b).norm() <= (0.03 if loose else 1e-5) * b.norm(), name


# norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_norms(dtype):
    with seeded(6):
        W, A, B = torch.randn(20, 12).to(dtype), torch.randn(3, 12), torch.randn(20, 3)
    exact = references.plain_row_norms(W.double(), A.double(), B.double())
    assert_close(row_norms(W, A, B).double(), exact, rtol=1e-5, atol=1e-6)
    near = -W[:, :3].float()  # W + BA = 0 in the first columns' span: everything cancels
    few = row_norms(W[:, :3], torch.eye(3), near)
    assert few.isfinite().all() and few.max() < 0.01


def test_dora_in_half_precision_is_as_exact_as_the_plain_formula():
    made = model(dora=True, dtype=torch.bfloat16)
    layer = made.base_model.model[0]
    layer.set_adapter("default")
    x = inputs(dtype=torch.bfloat16)
    m = layer.methods["default"]
    W, b = layer.base_layer.weight.double(), layer.base_layer.bias.double()
    A, B = (f.double() for f in m.factors().matrices())
    merged = W + B @ A
    ratio = (m.lora_magnitude_vector.weight.double() / merged.norm(dim=1))[:, None]
    exact = x.double() @ (ratio * merged).T + b
    base = layer.base_layer(x)
    rounded = (base.float() - b.float()) * ratio[:, 0].float() + b.float() + (x.float() @ (ratio * (B @ A)).T.float())
    error, plain_error = ((t.double() - exact).abs().max() for t in (layer(x), rounded.to(torch.bfloat16)))
    assert error <= plain_error * 1.01


# mixed batches


@pytest.mark.parametrize("names", ["ab", "aabb", "abab", "ab_", "abc_abc_", "aab", "aaa", "bc__"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_batches_equal_the_rows_one_by_one(names, dtype):
    layer = model(dtype=dtype).base_model.model[0]
    tuner = model(dtype=dtype)
    tuner.add_adapter("c", graft.LoraConfig(r=3, lora_alpha=2, target_modules=["0", "2"]))
    for name, p in tuner.named_parameters():
        if ".c." in name:
            nn.init.normal_(p, std=0.4)
    called = {"a": "default", "b": "other", "c": "c", "_": "__base__"}
    rows = [called[n] for n in names]
    x = inputs(5 * len(rows), dtype).view(len(rows), 5, 12)
    mixed = tuner(x, adapter_names=rows)
    for i, name in enumerate(rows):
        alone = tuner(x[i : i + 1], adapter_names=[name])
        assert_close(mixed[i : i + 1], alone, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5)
    mixed.float().square().sum().backward()
    grads = {n: p.grad.clone() for n, p in tuner.named_parameters() if p.grad is not None}
    assert len(grads) == 4 * len({n for n in names if n != "_"} - {"c"}) and layer.output_is_new


def plain_add_groups(y, x, factors, order, sizes):
    """Return a copy of y with s · x Aᵀ Bᵀ added to the rows of each (A, B, s), computed in A's dtype; the reference.

    y (batch, …, out), x (batch, …, in). order: the rows of the first adapter, then of the second, …; sizes: how many
    each has.
    """
    out = y.clone()
    for index, (A, B, s) in zip(order.split(list(sizes)), factors):
        out[index] += (x[index].to(A.dtype) @ A.T @ B.T * s).to(y.dtype)
    return out


def test_groups_equal_the_plain_formula():
    with seeded(8):
        x, y = torch.randn(6, 4, 12), torch.randn(6, 4, 20)
        factors = [(torch.randn(3, 12), torch.randn(20, 3), s) for s in (1.37, 0.4)]
    order = torch.tensor([4, 0, 5, 2])
    expected = plain_add_groups(y, x, factors, order, [2, 2])
    assert torch.equal(expected[[1, 3]], y[[1, 3]])
    for i, (A, B, s) in zip(order.tolist(), [f for f in factors for _ in range(2)]):
        assert_close(expected[i], y[i] + s * x[i] @ A.T @ B.T)
    assert mixed.can_add_groups(factors, [2, 2])
    assert_close(mixed.add_groups(y, x, factors, order, [2, 2]), expected)
    assert not mixed.can_add_groups(factors, [1, 3])
    assert not mixed.can_add_groups([*factors, (torch.randn(2, 12), torch.randn(20, 2), 1.0)], [2, 2, 2])
    wide_factors = (torch.empty(3, 200_000), torch.empty(20, 3), 1.0)
    assert not mixed.can_add_groups([wide_factors, wide_factors], [2, 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_without_gradients(dtype):
    """Of other sizes and ranks, one after another; in order, stacked."""
    with seeded(8):
        x, y = torch.randn(6, 4, 12).to(dtype), torch.randn(6, 4, 20).to(dtype)
        factors = [(torch.randn(r, 12), torch.randn(20, r), s) for r, s in ((3, 1.37), (3, 0.4), (2, -1.1))]
    cases = [
        (factors[:2], [4, 0, 5, 2], [2, 2], False),
        (factors, [4, 0, 5, 2], [1, 2, 1], False),
        (factors[:2], [0, 1, 2, 3, 4, 5], [3, 3], True),
        (factors, [0, 1, 2, 3, 4, 5], [2, 2, 2], True),
    ]
    with torch.inference_mode():
        for some, order, sizes, in_order in cases:
            order = torch.tensor(order)
            expected = plain_add_groups(
                y.double(), x.double(), [(A.double(), B.double(), s) for A, B, s in some], order, sizes
            )
            assert mixed.can_add_groups(some, sizes)
            found = mixed.add_groups(y.clone(), x, some, order, sizes, in_order)
            assert found.dtype == dtype
            tolerance = 1e-5 if dtype == torch.float32 else 2**-8
            assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


# few rows


@pytest.mark.parametrize("shape", [(4,), (2, 3), (1,)])
@pytest.mark.parametrize("scale, bias", [(1.37, True), (1.0, False)])
def test_few_rows_in_one_function_have_the_bits_of_plain_operations(shape, scale, bias):
    torch.manual_seed(0)
    x = torch.randn(*shape, 12, requires_grad=True)
    A, B = torch.randn(3, 12, requires_grad=True), torch.randn(10, 3, requires_grad=True)
    W, b, g = torch.randn(10, 12), torch.randn(10) if bias else None, torch.randn(*shape, 10)

    def in_turn(x, A, B):
        x = x.view_as(x)
        return low_rank.plain(nn.functional.linear(x, W, b), x, A, B, scale)

    def at_once(x, A, B):
        return low_rank.few_rows_linear(x, W, b, A, B, scale)

    found = []
    for form in (in_turn, at_once):
        y = form(x, A, B)
        found.append((y, *torch.autograd.grad(y, (x, A, B), g)))
    assert all(torch.equal(a, b) for a, b in zip(*found))
    assert at_once(x.detach(), A, B.detach()).requires_grad
    W, b = W.double(), None if b is None else b.double()
    values = [t.detach().double().requires_grad_() for t in (x, A, B)]
    assert torch.autograd.gradcheck(at_once, values) and torch.autograd.gradgradcheck(at_once, values)


@pytest.mark.parametrize("rows", [3, low_rank.FUSED_FROM])
@pytest.mark.parametrize("other", ["", "dropout", "A is fixed", "bfloat16", "autocast", "a hook", "no gradients"])
def test_where_few_rows_run_in_one_function(rows, other, monkeypatch):
    calls = []
    real = fused.few_rows_linear
    monkeypatch.setattr(fused, "few_rows_linear", lambda *args: calls.append(1) or real(*args))
    base = nn.Sequential(nn.Linear(12, 10, dtype=torch.bfloat16 if other == "bfloat16" else None))
    config = graft.LoraConfig(target_modules=["0"], r=3, lora_dropout=0.5 * (other == "dropout"))
    model = graft.get_peft_model(base, config)
    layer = model.base_model.model[0]
    layer.lora_A["default"].weight.requires_grad_(other != "A is fixed")
    if other == "a hook":
        layer.base_layer.register_forward_hook(lambda *_: None)
    with torch.autocast("cpu", enabled=other == "autocast"), torch.set_grad_enabled(other != "no gradients"):
        model(torch.randn(rows, 12, dtype=base[0].weight.dtype))
    assert bool(calls) == (rows == 3 and not other)
