# SPDX-License-Identifier: Apache-2.0
"""LoKr: dropout, the sizes of its factors, and what PEFT cannot do."""

import pytest
import torch
from torch import nn

import graft
from graft.kernels.structured import factorization
from tests import models
from tests.models import seeded
from tests.pair import LIBS, close


def made(base, **options):
    with seeded(0):
        model = graft.get_peft_model(nn.Sequential(base), graft.LoKrConfig(target_modules=["0"], **options))
        for p in model.parameters():
            if p.requires_grad:
                p.data.normal_()
    return model.train(), model.base_model.model[0]


@pytest.mark.parametrize("factor", [-1, 2, 3, 4, 6, 7, 100])
def test_factors_of_a_size(factor):
    assert factorization(12, -1) == (3, 4) and factorization(24, -1) == (4, 6) and factorization(7, -1) == (1, 7)
    for n in (1, 6, 10, 12, 24, 36, 72):
        a, b = factorization(n, factor)
        assert a * b == n and (a <= b or a == factor)


@pytest.mark.parametrize("size", [12, 15, 20, 24, 36])
@pytest.mark.parametrize("factor", [-1, 2, 3, 4, 5, 6, 8])
def test_shapes_are_pefts(size, factor):
    found = []
    for lib in LIBS:
        config = lib.LoKrConfig(target_modules=["0"], r=2, decompose_both=True, decompose_factor=factor)
        model = lib.get_peft_model(nn.Sequential(nn.Linear(size, 24)), config)
        found.append({name: p.shape for name, p in model.named_parameters()})
    assert found[0] == found[1]


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize(
    "make, shape", [(lambda: nn.Linear(12, 20), (5, 12)), (lambda: nn.Conv2d(4, 6, 3), (2, 4, 5, 5))]
)
def test_rank_dropout_takes_out_rows(make, shape, scale):
    _, layer = made(make(), r=2, alpha=3, rank_dropout=0.4, rank_dropout_scale=scale)
    with seeded(1):
        x = torch.randn(shape)
    with seeded(4):
        y = layer(x)
    rows = layer.out_features
    with seeded(4):
        kept = (torch.rand(rows) > 0.4).float()
    assert 0 < kept.sum() < rows
    kept = kept / kept.mean() if scale else kept
    full = layer.eval()(x) - layer.base_layer(x)
    close(y - layer.base_layer(x), full * (kept if len(shape) == 2 else kept[:, None, None]), 1e-4)


def test_module_dropout_drops_all_or_nothing():
    _, layer = made(nn.Linear(12, 20), r=2, module_dropout=0.5)
    x = torch.linspace(-1, 1, 60).view(5, 12)
    base, full = layer.base_layer(x), layer.eval()(x)
    layer.train()
    models.seed(0)
    draws = [layer(x) for _ in range(60)]
    dropped = sum(torch.allclose(y, base) for y in draws)
    assert 15 < dropped < 45 and all(torch.allclose(y, base) or torch.allclose(y, full, atol=1e-5) for y in draws)


@pytest.mark.differs("LoKr `use_effective_conv2d` on Conv1d")
def test_the_effective_form_of_a_conv1d():
    """PEFT fails in the forward pass."""
    model, layer = made(nn.Conv1d(6, 9, 3), r=1, alpha=1.3, use_effective_conv2d=True)
    assert layer.lokr_t2["default"].shape == (1, 1, 3, 1)
    t, a, b, w1 = (getattr(layer, f"lokr_{n}")["default"] for n in ("t2", "w2_a", "w2_b", "w1"))
    w2 = torch.einsum("abk,ap,bq->pqk", t[..., 0], a, b)
    expected = 1.3 * torch.einsum("lm,pqk->lpmqk", w1, w2).reshape(9, 6, 3)
    close(layer.get_delta_weight("default"), expected)
    x = torch.linspace(-1, 1, 60).view(1, 6, 10)
    y = model(x)
    model.merge_adapter()
    close(model(x), y)


def test_a_large_vocabulary_is_never_formed(monkeypatch):
    model, layer = made(nn.Embedding(50, 12), r=2)
    ids = torch.tensor([[3, 49], [0, 3]])
    expected = layer.base_layer(ids) + layer.get_delta_weight("default")[ids]
    monkeypatch.setattr(torch, "kron", None)
    close(model(ids), expected)
