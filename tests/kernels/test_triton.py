# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels against their plain forms: in Triton's interpreter, and on a GPU where there is one."""

import inspect
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graft
from graft.kernels import device, low_rank, mixed, products
from tests import models
from tests.models import seeded

pytest.importorskip("triton", reason="triton has no package here: pip install 'graft[triton]', for Linux only")

from graft.kernels.triton import mixed as triton_mixed
from graft.kernels.triton import products as fused

GPU = torch.cuda.is_available()
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("neither a GPU nor TRITON_INTERPRET=1", allow_module_level=True)

SCALE = 1.37
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (BF16, F32), (F32, BF16), (BF16, BF16), (F16, F16)]  # of the model, of the adapter
TOLERANCE = {
    F32: 2e-6,
    BF16: 2**-6,
    F16: 2**-10,
}  # of the largest value; the interpreter cuts to bfloat16 and not rounds


@pytest.fixture(params=["cpu", *(["cuda"] if GPU else [])])
def where(request):
    if GPU and request.param == "cpu":
        pytest.skip("on a machine with a GPU the kernels are compiled for it")
    return request.param


def draw(where, *shapes, dtype=F32, seed=1):
    with seeded(seed):
        return [torch.randn(shape).to(where, dtype) for shape in shapes]


def near(found, exact, dtype):
    assert found.shape == exact.shape and exact.dtype == torch.float64
    error = (found.double() - exact).abs().max() / exact.abs().max()
    assert error < TOLERANCE[dtype], error


# the products


@pytest.mark.parametrize("rank", [1, 4, 16, 40, 70])
@pytest.mark.parametrize("wide, narrow", DTYPES)
def test_products(rank, wide, narrow, where):
    rows, n = 69, 87  # more than a tile, no multiple of one
    x, y = draw(where, (rows, n), (rows, n), dtype=wide)
    h, A, B = draw(where, (rows, rank), (rank, n), (n, rank), dtype=narrow)
    X, Y, H, DA, DB = (t.double() for t in (x, y, h, A, B))
    least = max(wide, narrow, key=TOLERANCE.get)
    for name, found, exact in (
        ("down", fused.down(x, A, SCALE), products.down(X, DA, SCALE)),
        ("down, of a transpose", fused.down(x, B.T), products.down(X, DB.T)),
        ("up", fused.up(h, B, wide), products.up(H, DB, torch.float64)),
        ("outer", fused.outer(h, x), products.outer(H, X)),
        ("outer_wide", fused.outer_wide(x, h, SCALE), products.outer_wide(X, H, SCALE)),
        ("add_up", fused.add_up(y, h, B, SCALE), products.add_up(Y, H, DB, SCALE)),
    ):
        dtype = wide if name in ("up", "add_up") else narrow
        assert found.dtype == dtype, name
        near(found, exact, least)


def test_inputs_in_other_orders(where):
    x, h = draw(where, (87, 69), (6, 69))
    A, B = draw(where, (87, 6), (6, 87))
    y = torch.zeros(69, 87, device=where)
    near(fused.down(x.T, A.T), (x.T @ A).double(), F32)
    near(fused.add_up(y, h.T, B.T, SCALE), (h.T @ B * SCALE).double(), F32)
    near(fused.outer(h.T, x.T), (h @ x.T).double(), F32)
    near(fused.down(x.T[::2, :5], A.T[:, :5]), (x.T[::2, :5] @ A[:5]).double(), F32)
    near(fused.down(x[:1].expand(3, 69), h), (x[:1].expand(3, 69) @ h.T).double(), F32)


def test_no_rows(where):
    (A,) = draw(where, (3, 12))
    x = torch.zeros(0, 12, device=where)
    assert fused.down(x, A).shape == (0, 3)
    assert torch.equal(fused.outer(x[:, :3], x), torch.zeros(3, 12, device=where))


def test_wide_sums_stay_exact(where):
    """Half precision is summed in float32: 4000 ones, which bfloat16 would stop adding at 256."""
    x, A = torch.ones(20, 4000, device=where, dtype=BF16), torch.ones(3, 4000, device=where, dtype=BF16)
    assert (fused.down(x, A) == 4000).all()
    assert (fused.outer(A.T, x.T) == 4000).all()
    assert (fused.outer_wide(x.T, A.T, 1.0) == 4000).all()


# dropout


def test_dropout_keeps_the_share_that_it_should(where):
    like = torch.empty(300, 200, device=where)
    for p in (0.0625, 0.1, 0.5, 0.9):
        mask = fused.kept(like, p, 3)
        assert mask.shape == like.shape and abs(mask.float().mean().item() - (1 - p)) < 0.007
        assert not torch.equal(mask, fused.kept(like, p, 4))
    halves = fused.kept(like, 0.5, 2**61 + 3).float()
    assert not torch.equal(halves, fused.kept(like, 0.5, 3).float())
    for one, other in (
        (halves[1:], halves[:-1]),
        (halves[:, 1:], halves[:, :-1]),
    ):  # neighbours do not follow each other
        assert abs((one * other).mean().item() - 0.25) < 0.01


@pytest.mark.parametrize("p", [0.05, 0.6])
def test_all_products_drop_the_same_elements(p, where):
    rows, n, rank, seed = 69, 87, 5, 2**40 + 11
    x, h, A = draw(where, (rows, n), (rows, rank), (rank, n))
    drop = dict(p=p, seed=seed)
    exact = dict(drop, kept=fused.kept)
    X, H, W = x.double(), h.double(), A.double()
    assert 0 < (~fused.kept(x, p, seed)).float().mean() < 2 * p
    near(fused.down(x, A, SCALE, **drop), products.down(X, W, SCALE, **exact), F32)
    near(fused.up(h, A.T, F32, **drop), products.up(H, W.T, torch.float64, **exact), F32)
    near(fused.outer(h, x, **drop), products.outer(H, X, **exact), F32)
    added = X + SCALE * products.up(H, W.T, torch.float64, **exact)
    near(fused.add_up(x.clone(), h, A.T, SCALE, **drop), added, F32)


def test_a_vera_layer_trains_as_with_the_plain_form(where, monkeypatch):
    """Another method on the same products."""

    def gradients():
        with seeded(1):
            layer = nn.Linear(300, 410)
            made = graft.get_peft_model(nn.Sequential(layer), graft.VeraConfig(r=5, target_modules=["0"])).to(where)
            for name, p in made.named_parameters():
                if "vera_lambda" in name:
                    nn.init.normal_(p)
            x = torch.randn(90, 300).to(where).requires_grad_()
        made(x).square().mean().backward()
        return [x.grad, *(p.grad for p in made.parameters() if p.requires_grad)]

    with device.force(False):
        expected = gradients()
    starts = counted(monkeypatch)
    with device.force(True):
        found = gradients()
    assert starts and len(found) == 3
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-5)


# the fused update


def results(function, values, weights=5):
    """Output and gradients for a loss with different weights everywhere."""
    y, x, A, B = values
    out = function(y * 1, x, A, B, SCALE)
    with seeded(weights):
        w = torch.randn(out.shape).to(out.device)
    return [out.detach(), *torch.autograd.grad((out * w).sum(), [t for t in values if t.requires_grad])]


def update(where, wide, narrow, x_grad=True, rows=70, rank=3):
    y, x = draw(where, (2, rows // 2, 20), (2, rows // 2, 12), dtype=wide)
    A, B = draw(where, (rank, 12), (20, rank), dtype=narrow, seed=2)
    return [y.requires_grad_(), x.requires_grad_(x_grad), A.requires_grad_(), B.requires_grad_()]


@pytest.mark.parametrize("x_grad", [True, False])
@pytest.mark.parametrize("wide, narrow", DTYPES)
def test_add_low_rank(wide, narrow, x_grad, where):
    values = update(where, wide, narrow, x_grad)
    exact = results(low_rank.plain, [t.detach().double().requires_grad_(t.requires_grad) for t in values])
    with device.force(True):
        found = results(low_rank.add_low_rank, values)
    assert [t.dtype for t in found] == [wide, wide, *([wide] if x_grad else []), narrow, narrow]
    for one, other in zip(found, exact, strict=True):
        near(one, other, max(wide, narrow, key=TOLERANCE.get))


def test_add_low_rank_with_dropout(where, monkeypatch):
    monkeypatch.setattr(low_rank, "new_seed", lambda: 12345678901)
    values = update(where, F32, F32)
    mask = fused.kept(torch.empty(70, 12, device=where), 0.4, 12345678901).view(2, 35, 12) / 0.6

    def masked(y, x, A, B, scale):
        return low_rank.plain(y, x * mask, A, B, scale)

    exact = results(masked, [t.detach().double().requires_grad_() for t in values])
    with device.force(True):
        found = results(lambda *args: low_rank.add_low_rank(*args, 0.4), values)
    for one, other in zip(found, exact, strict=True):
        near(one, other, F32)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_second_derivatives_fall_back(p, where, monkeypatch):
    monkeypatch.setattr(low_rank, "new_seed", lambda: 99)
    y, x, A, B = update(where, F32, F32)
    mask = fused.kept(torch.empty(70, 12, device=where), p, 99).view(2, 35, 12) / (1 - p)

    def second(out):
        (gx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return torch.autograd.grad(gx.square().sum(), (x, A, B))

    expected = second(low_rank.plain(y.detach(), x * mask, A, B, SCALE))
    with device.force(True):
        found = second(low_rank.add_low_rank(y.detach().clone(), x, A, B, SCALE, p))
    for one, other in zip(found, expected, strict=True):
        near(one, other.double(), F32)


# mixed batches


def batch(where, ranks, sizes, wide=F32, narrow=F32, tokens=(7,), n=37, out=45, batch=9):
    x, y = draw(where, (batch, *tokens, n), (batch, *tokens, out), dtype=wide)
    factors = [(*draw(where, (r, n), (out, r), dtype=narrow, seed=10 + i), 0.3 + 0.37 * i) for i, r in enumerate(ranks)]
    with seeded(4):
        order = torch.randperm(batch)[: sum(sizes)].to(where)
    return y, x, factors, order, list(sizes)


def grouped(function, y, x, factors, order, sizes):
    given = [y, x, *itertools.chain.from_iterable(f[:2] for f in factors)]
    for t in given:
        t.requires_grad_()
    out = function(y * 1, x, factors, order, sizes)
    with seeded(6):
        w = torch.randn(out.shape).to(out.device)
    return [out.detach(), *torch.autograd.grad((out * w).sum(), given)]


def doubles(y, x, factors, order, sizes):
    return (
        y.detach().double(),
        x.detach().double(),
        [(A.detach().double(), B.detach().double(), s) for A, B, s in factors],
        order,
        sizes,
    )


@pytest.mark.parametrize("tokens", [(), (1,), (7,), (3, 4)])
@pytest.mark.parametrize(
    "ranks, sizes",
    [
        ([3, 3], [2, 2]),
        ([1, 40, 16], [1, 4, 2]),  # other ranks, other sizes, rows without adapter
        ([4, 4, 4], [3, 0, 5]),  # an empty segment
        ([5], [9]),
        ([70, 2], [8, 1]),
    ],
)
def test_add_groups(ranks, sizes, tokens, where):
    values = batch(where, ranks, sizes, tokens=tokens)
    exact = grouped(mixed.plain, *doubles(*values))
    with device.force(True):
        assert mixed.fits(*values[:3], sizes)
        found = grouped(mixed.add_groups, *values)
    for one, other in zip(found, exact, strict=True):
        if other.abs().max() > 0:
            near(one, other, F32)
        else:  # of an adapter without rows
            assert not one.any()
    rest = [i for i in range(9) if i not in values[3].tolist()]
    assert torch.equal(found[0][rest], values[0][rest]) and not found[2][rest].any()


@pytest.mark.parametrize("wide, narrow", DTYPES)
def test_add_groups_in_other_dtypes(wide, narrow, where):
    values = batch(where, [4, 9], [3, 4], wide, narrow)
    exact = grouped(mixed.plain, *doubles(*values))
    with device.force(True):
        found = grouped(mixed.add_groups, *values)
    for one, other in zip(found, exact, strict=True):
        near(one, other, max(wide, narrow, key=TOLERANCE.get))


def test_add_groups_overwrites_y_and_takes_transposes(where):
    y, x, factors, order, sizes = batch(where, [4, 9], [3, 4])
    factors = [(A.T.contiguous().T, B.T.contiguous().T, s) for A, B, s in factors]
    x = x.transpose(0, 1).contiguous().transpose(0, 1)
    expected = mixed.plain(y, x, factors, order, sizes)
    with device.force(True), torch.no_grad():
        found = mixed.add_groups(y, x, factors, order, sizes)
    assert found.data_ptr() == y.data_ptr()
    assert_close(found, expected)


def test_frozen_factors_and_inputs(where):
    y, x, factors, order, sizes = batch(where, [4, 9], [3, 4])
    (A, B, s), other = factors
    B.requires_grad_()
    with device.force(True):
        out = mixed.add_groups(y, x, factors, order, sizes)
    (found,) = torch.autograd.grad(out.square().sum(), B)
    fresh = batch(where, [4, 9], [3, 4])[0]
    expected = mixed.plain(fresh, x, [(A, B, s), other], order, sizes)
    assert_close(found, *torch.autograd.grad(expected.square().sum(), B), rtol=1e-4, atol=1e-3)


def test_second_derivatives_of_a_mixed_batch_fall_back(where):
    def second(function):
        y, x, factors, order, sizes = batch(where, [4, 9], [3, 4])
        given = [x, *(f for A, B, _ in factors for f in (A, B))]
        for t in given:
            t.requires_grad_()
        out = function(y, x, factors, order, sizes)
        (gx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return torch.autograd.grad(gx.square().sum(), given)

    expected = second(mixed.plain)
    with device.force(True):
        found = second(mixed.add_groups)
    for one, other in zip(found, expected, strict=True):
        near(one, other.double(), F32)


def test_addresses_are_sent_once(where):
    values = batch(where, [4, 9], [3, 4])
    with device.force(True), torch.no_grad():
        mixed.add_groups(*values)
        before = triton_mixed._numbers.cache_info()
        mixed.add_groups(*values)
    after = triton_mixed._numbers.cache_info()
    assert after.misses == before.misses and after.hits == before.hits + 2


# in a model


def llama(where, dropout=0.0, **options):
    config = dict(r=3, lora_alpha=3 * SCALE, target_modules=["q_proj", "down_proj"], lora_dropout=dropout)
    with seeded(1):
        made = graft.get_peft_model(models.make("llama"), graft.LoraConfig(**{**config, **options}))
        made.add_adapter("b", graft.LoraConfig(**{**config, "r": 5}))
        for name, p in made.named_parameters():
            if "lora_" in name:
                nn.init.normal_(p, std=0.3)
    return made.to(where)


def counted(monkeypatch):
    """How often kernels start."""
    from graft.kernels.triton import launch

    starts = []
    real = launch._start
    monkeypatch.setattr(launch, "_start", lambda kernel, *args: starts.append(kernel) or real(kernel, *args))
    return starts


def step(made, inputs, steps=2):
    """Parameters after some training steps."""
    made.train()
    optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        models.output(made, inputs).float().square().mean().backward()
        optimizer.step()
    return {n: p.detach() for n, p in made.named_parameters() if p.requires_grad}


def tokens(where, size):
    return {k: v.to(where) for k, v in models.inputs("llama", size).items()}


@pytest.mark.parametrize("dora", [False, True])
def test_training_equals_the_plain_form(dora, where, monkeypatch):
    inputs = tokens(where, 10)  # 70 rows
    with device.force(False):
        expected = step(llama(where, use_dora=dora), inputs)
    starts = counted(monkeypatch)
    with device.force(True):
        found = step(llama(where, use_dora=dora), inputs)
    start = dict(llama(where, use_dora=dora).named_parameters())
    layers = sum(name.endswith("q_proj.lora_A.default.weight") for name in start) * 2
    assert len(starts) >= 2 * layers * 5  # 2 of forward, of backward: h, A, B, and x but for the first layer
    assert found.keys() == expected.keys() and len(found) >= 2 * layers
    for name, p in found.items():
        assert_close(p, expected[name], rtol=1e-4, atol=1e-5)
        assert not torch.equal(p, start[name]), name


@pytest.mark.parametrize("dora", [False, True])
def test_training_with_dropout_repeats_under_checkpointing(dora, where):
    inputs = tokens(where, 10)
    plain, checkpointed = (llama(where, dropout=0.3, use_dora=dora) for _ in range(2))
    models.checkpoint(checkpointed)
    with device.force(True):
        with seeded(3):
            expected = step(plain, inputs, 1)
        with seeded(3):
            found = step(checkpointed, inputs, 1)
        with seeded(4):
            other = step(llama(where, dropout=0.3, use_dora=dora), inputs, 1)
    for name, p in found.items():
        assert_close(p, expected[name])
    assert any(not torch.equal(other[name], p) for name, p in expected.items())


@pytest.mark.parametrize("names", [["b", "__base__", "default", "b"], ["default", "b"] * 2, ["b"] * 4])
def test_mixed_batch_equals_the_plain_form(names, where, monkeypatch):
    inputs = {**tokens(where, 4), "adapter_names": names}
    made = llama(where).eval()
    factors = {n: p.requires_grad_() for n, p in made.named_parameters() if "lora_" in n}

    def gradients():
        loss = models.output(made, inputs).square().mean()
        return dict(zip(factors, torch.autograd.grad(loss, [*factors.values()], allow_unused=True)))

    with device.force(False):
        expected, gradients_then = models.output(made, inputs).detach(), gradients()
    starts = counted(monkeypatch)
    with device.force(True):
        with torch.no_grad():
            assert_close(models.output(made, inputs), expected, rtol=1e-4, atol=1e-4)
        assert starts
        found = gradients()
    for name, g in gradients_then.items():
        assert (g is None) == (found[name] is None) == (name.split(".")[-2] not in names), name
        if g is not None:
            assert_close(found[name], g, rtol=1e-3, atol=1e-4)


def test_compiled_code_runs_the_plain_form(where, monkeypatch):
    inputs = tokens(where, 10)
    made = llama(where).eval()
    with device.force(False):
        expected = models.output(made, inputs)
    starts = counted(monkeypatch)
    with device.force(True):
        torch.compiler.reset()
        compiled = torch.compile(made.base_model.model, fullgraph=True, backend="aot_eager")
        assert_close(compiled(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
    assert not starts


# the choice


def test_the_choice():
    x, wide = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.float64)
    assert not device.uses_triton(x) and device.form_for(products, x) is products
    with device.force(True):
        assert device.uses_triton(x) and not device.uses_triton(x, wide)  # the kernels sum in float32
        assert device.form_for(products, x) is fused
        with device.force(False):
            assert not device.uses_triton(x)
        assert device.uses_triton(x)
    assert not device.uses_triton(x)


def test_the_device_decides_only_if_asked(monkeypatch):
    assert device._forced is False or os.environ.get("GRAFT_TRITON") == "1"
    monkeypatch.setattr(device, "_forced", None)
    assert not device.uses_triton(torch.zeros(2, 3))
    if GPU:
        x = torch.zeros(2, 3, device="cuda")
        assert device.uses_triton(x) == (torch.cuda.get_device_capability() >= device.CAPABILITY)


def test_both_forms_take_the_same_arguments():
    names = {n for n, f in vars(fused).items() if inspect.isfunction(f) and f.__module__ == fused.__name__}
    files = Path(device.__file__).parent.glob("*.py")
    called = {name for file in files for name in re.findall(r"\bform\.(\w+)", file.read_text())}
    assert {"kept", "down", "up", "add_up", "outer", "through_up"} <= called <= names
    for form, plain in ((fused, products), (triton_mixed, mixed)):
        for name in names if form is fused else {"add_groups"}:
            expected = dict(inspect.signature(getattr(plain, name)).parameters)
            expected.pop("kept", None)  # of the reference only
            found = inspect.signature(getattr(form, name)).parameters
            assert [(p.name, p.default) for p in found.values()] == [(p.name, p.default) for p in expected.values()]


def test_importing_and_training_on_a_cpu_does_not_import_triton():
    code = """
import sys, torch, graft
net = graft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 3)), graft.LoraConfig(target_modules=["0"]))
net(torch.ones(70, 4)).sum().backward()
print("triton" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


COMPILE = """
from types import SimpleNamespace
import torch, triton
from triton.backends.compiler import GPUTarget
from graft.kernels import device, low_rank, mixed

target = GPUTarget("cuda", 90, 32)
triton.runtime.driver.set_active(SimpleNamespace(
    get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
))
made = []
triton.JITFunction.__getitem__ = lambda kernel, grid: lambda *args, **options: made.append(
    kernel.warmup(*args, grid=grid, **options)
)
y, x = torch.zeros(4, 70, 48, dtype=torch.bfloat16), torch.zeros(4, 70, 80, dtype=torch.bfloat16, requires_grad=True)
A, B = torch.zeros(8, 80, requires_grad=True), torch.zeros(48, 8, requires_grad=True)
with device.force(True):
    low_rank.add_low_rank(y, x, A, B, 1.5, 0.1).sum().backward()
    mixed.add_groups(y, x, [(A, B, 1.5)] * 2, torch.tensor([2, 0, 1]), [2, 1]).sum().backward()
print(len(made), len({k.hash for k in made}), all(k.asm["cubin"] for k in made), max(k.metadata.shared for k in made))
"""


def test_the_kernels_compile_for_a_gpu(tmp_path):
    """The interpreter takes what no compiler would. This needs no GPU, only the compiler that triton brings."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    started, different, binary, shared = done.stdout.split()
    assert (started, different, binary) == ("12", "12", "True")
    assert int(shared) <= 99 * 1024  # what a block may have on every GPU with bfloat16
