# SPDX-License-Identifier: Apache-2.0
"""Algebra of factors against torch.linalg on the dense ΔW, which PEFT's layers give."""

import numpy as np
import peft
import pytest
import torch

import graft
from graft.files import algebra
from graft.files.algebra import Product
from graft.files.formats import read
from graft.files.neutral import LowRank
from graft.files.tensors import make_tensor
from tests import models
from tests.pair import adapt, close, randomize
from tests.samples import SAMPLES, over_all

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT and graft about the samples themselves
LORA = [s for s in SAMPLES if s.method == "LORA" and not {"forward", "merge"} & s.unlike]
# where ΔW is not s B A of the base as it is
OTHERS = ("dora", "kasa", "bdlora", "qalora", "pissa", "olora", "corda", "lora_ga", "loftq", "grouped", "monteclora")


def dense(parts):
    return [torch.from_numpy(p.B @ p.A) for p in parts]


def some(seed, out=12, fan_in=9, r=4):
    rng = np.random.default_rng(seed)
    return Product(rng.standard_normal((out, r)), rng.standard_normal((r, fan_in)))


@over_all([s for s in LORA if not any(o in s.name for o in OTHERS)])
def test_products_are_what_pefts_layers_add(sample, tmp_path):
    model = randomize(adapt(peft, sample), sample)
    model.save_pretrained(tmp_path)
    found = 0
    adapter = read(tmp_path)
    for name, layer in model.base_model.model.named_modules():
        if name not in adapter.modules or not hasattr(layer, "get_delta_weight"):
            continue
        (ours,) = dense(algebra.list_delta_products(adapter.modules[name]))
        theirs = layer.get_delta_weight("default").detach().double()
        theirs = theirs.T if getattr(layer, "fan_in_fan_out", False) else theirs.flatten(1)
        close(ours, theirs, 1e-5)
        found += 1
    assert found


@pytest.mark.parametrize("shape", [(12, 9, 4), (5, 30, 5), (3, 7, 6)])  # a rank beyond the width, too
def test_singular_values(shape):
    made = some(1, *shape)
    (W,) = dense([made])
    S = torch.linalg.svdvals(W)
    ours = algebra.compute_svd(made)
    k = min(len(S), len(ours.s))
    close(torch.from_numpy(ours.s)[:k], S[:k], 1e-12)
    close(torch.from_numpy(algebra.compute_singular_values(made))[:k], S[:k], 1e-12)
    close(torch.from_numpy(ours.U * ours.s @ ours.Vt), W, 1e-12)
    assert algebra.frobenius_norm(made) == pytest.approx(float(torch.linalg.matrix_norm(W)), rel=1e-12)
    p = S[S > 1e-12] / S.sum()
    assert algebra.effective_rank(ours.s) == pytest.approx(float(torch.exp(-(p * p.log()).sum())), rel=1e-9)
    assert algebra.stable_rank(ours.s) == pytest.approx(float(S.square().sum() / S[0] ** 2), rel=1e-12)


def test_ranks_by_kohyas_rules():
    s = np.array([8.0, 4.0, 2.0, 1.0, 0.5])
    squares = s**2
    for energy in (0.5, 0.75, 0.9, 0.95, 0.99, 1.0):
        wanted = next(k for k in range(1, 6) if squares[:k].sum() >= energy * squares.sum())
        assert algebra.rank_for_energy(s, energy) == wanted
        assert algebra.energy_share(s, wanted) >= energy
    for ratio in (1.5, 3, 5, 17):
        assert algebra.rank_for_ratio(s, ratio) == sum(x > 8 / ratio for x in s)
    zero = np.zeros(3)
    assert algebra.rank_for_energy(zero, 0.9) == algebra.rank_for_ratio(zero, 2) == 1
    assert algebra.stable_rank(zero) == algebra.effective_rank(zero) == 0 and algebra.energy_share(zero, 1) == 1


def test_sums_and_comparisons():
    a, b = some(1), some(2)
    (A, B) = dense([a, b])
    close(*dense([algebra.sum_products([a, b], (0.3, -2))]), 0.3 * A - 2 * B, 1e-12)
    assert algebra.inner_product(a, b) == pytest.approx(float((A * B).sum()), rel=1e-9)
    found = algebra.compare_deltas([a], [b])
    assert found.cosine == pytest.approx(float((A * B).sum() / A.norm() / B.norm()), rel=1e-9)
    assert found.relative == pytest.approx(float((A - B).norm() / max(A.norm(), B.norm())), rel=1e-9)
    again = Product(2 * a.B, a.A / 2)
    same = algebra.compare_deltas([a], [again])
    assert same.relative < 1e-15 and same.cosine == pytest.approx(1) and same.angle < 1e-6
    half = algebra.compare_deltas([a], [Product(a.B / 2, a.A)])
    assert half.relative == pytest.approx(0.5) and half.cosine == pytest.approx(1) and half.angle < 1e-6
    nothing = Product(0 * a.B, a.A)
    assert algebra.compare_deltas([a], [nothing]) == (None, pytest.approx(1, rel=1e-15), None)
    assert algebra.compare_deltas([nothing], [nothing]) == (None, 0.0, None)


@pytest.mark.parametrize("angle", [1e-7, 0.3, 45, 89.9, 90])
def test_the_largest_angle(angle):
    """One plane turned away from another around a line that both have, with rows that are the same."""
    t = np.radians(angle)
    A = np.eye(2, 5)
    a, b = np.zeros((6, 2)), np.zeros((6, 2))
    a[0, 0] = a[1, 1] = b[0, 0] = 1
    b[1, 1], b[2, 1] = np.cos(t), np.sin(t)
    assert algebra.largest_principal_angle(Product(a, A), Product(b * [3, 0.1], A)) == pytest.approx(angle, rel=1e-6)
    assert algebra.largest_principal_angle(Product(a[:, :1], A[:1]), Product(b, A)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", ["linear", "conv", "embedding", "experts"])
def test_new_factors_of_the_largest_triplets(kind):
    rng = np.random.default_rng(3)
    shapes = {
        "linear": ((4, 9), (12, 4)), "conv": ((4, 3, 3, 2), (12, 4, 1, 1)), "embedding": ((4, 20), (6, 4)),
        "experts": ((3, 4, 9), (3, 12, 4)),
    }  # fmt: skip
    A, B = (rng.standard_normal(s) for s in shapes[kind])
    held = LowRank(make_tensor(A), make_tensor(B), 2.5, kind)
    parts = algebra.list_delta_products(held)
    made = [algebra.compute_svd(p) for p in parts]
    whole = algebra.list_delta_products(algebra.replace_factors(held, made, 4))
    wider = algebra.list_delta_products(algebra.replace_factors(held, made, 7))
    for ours, wide, theirs in zip(dense(whole), dense(wider), dense(parts), strict=True):
        close(ours, theirs, 1e-12)
        close(wide, theirs, 1e-12)
    cut = algebra.replace_factors(held, made, 2)
    assert cut.scale == 2.5 and cut.rank == 2 and cut.kind == kind
    for ours, theirs in zip(dense(algebra.list_delta_products(cut)), dense(parts), strict=True):
        U, S, Vh = torch.linalg.svd(theirs, full_matrices=False)
        close(ours, U[:, :2] * S[:2] @ Vh[:2], 1e-11)


@over_all([s for s in SAMPLES if s.method == "LORA" and "dora" in s.name and "pissa" not in s.name])
def test_all_that_dora_changes(sample, tmp_path):
    model = randomize(adapt(peft, sample), sample)
    model.save_pretrained(tmp_path)
    base = models.make(sample.model).state_dict()
    merged = model.merge_and_unload().state_dict()
    for path, held in read(tmp_path).modules.items():
        W, new = base[f"{path}.weight"], merged[f"{path}.weight"]
        if "conv1D" in sample.model or "gpt2" in sample.model:
            W, new = W.T, new.T
        if held.kind == "embedding":
            theirs = new - W
        else:
            theirs = (new - W).flatten(1)
        close(torch.from_numpy(algebra.compute_dora_delta(held, W.numpy())), theirs.double(), 2e-5)


@over_all([s for s in SAMPLES if s.method == "LORA" and ("pissa" in s.name or "olora" in s.name)])
def test_what_was_taken_out_of_the_base_counts(sample, tmp_path):
    base = models.make(sample.model).state_dict()
    model = randomize(adapt(graft, sample), sample)
    model.save_pretrained(tmp_path)
    merged = model.merge_and_unload().state_dict()
    for path, held in read(tmp_path).low_rank.items():
        if held.shift is None:
            continue
        change = merged[f"{path}.weight"] - base[f"{path}.weight"]
        if held.magnitude is None:
            (ours,) = dense(algebra.list_delta_products(held))
        else:
            ours = torch.from_numpy(algebra.compute_dora_delta(held, base[f"{path}.weight"].numpy()))
        close(ours, (change.T if ours.shape != change.shape else change).double(), 1e-5)


def test_adaloras_triplets(tmp_path):
    config = peft.AdaLoraConfig(init_r=4, lora_alpha=7, target_modules=["lin0"], total_step=10)
    model = peft.get_peft_model(models.make("mlp"), config)
    layer = model.base_model.model.lin0
    with torch.no_grad():
        layer.lora_E["default"].normal_()
    model.save_pretrained(tmp_path)
    held = algebra.as_low_rank(read(tmp_path).modules["lin0"])
    (ours,) = dense(algebra.list_delta_products(held))
    close(ours, layer.get_delta_weight("default").detach().double(), 1e-5)
