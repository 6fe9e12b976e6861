# SPDX-License-Identifier: Apache-2.0
"""SVFT by its formula."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graft
from tests.models import seeded


def net(out=5):
    with seeded(0):
        return nn.Sequential(nn.Linear(6, out))


def made(out=5, **options):
    with seeded(1):
        config = graft.SvftConfig(target_modules=["0"], init_weights=False, **options)
        return graft.get_peft_model(net(out), config)


@pytest.mark.parametrize("d, r, numbers", [(0, None, 5), (1, None, 13), (2, 4, 14), (9, None, 25)])
def test_bands_between_singular_vectors(d, r, numbers):
    model = made(off_diag=d, r=r)
    layer = model.base_model.model[0]
    delta = layer.get_delta_weight("default")
    U, _, V = torch.linalg.svd(net()[0].weight, full_matrices=False)
    inner = U.T @ delta @ V.T  # with signs of its own
    n = r or 5
    near = (torch.arange(5)[:, None] - torch.arange(5)).abs() <= d
    near[n:], near[:, n:] = False, False
    assert len(layer.svft_M["default"]) == numbers == near.sum()
    assert (inner.abs() > 1e-6).sum() == numbers and (inner.abs() > 1e-6)[near].all()
    assert_close(inner.abs()[near], layer.svft_M["default"].abs() / 2, atol=1e-5, rtol=1e-4)  # σ(0)


def test_the_start_is_narrower_the_more_singular_vectors():
    with seeded(1):
        model = graft.get_peft_model(
            nn.Sequential(nn.Linear(64, 64)), graft.SvftConfig(target_modules=["0"], init_weights=False, off_diag=63)
        )
    assert model.base_model.model[0].svft_M["default"].detach().std() == pytest.approx(64**-0.5, rel=0.05)


def test_places_of_other_patterns(tmp_path):
    model = made(pattern="random", off_diag=1, seed=3)
    places = model.base_model.model[0].svft_places["default"]
    assert len(places.unique()) == 13 and not torch.equal(
        places, made(pattern="random", off_diag=1).base_model.model[0].svft_places["default"]
    )
    model.save_pretrained(tmp_path)
    loaded = graft.PeftModel.from_pretrained(net(), tmp_path)
    x = torch.linspace(-1, 1, 12).view(2, 6)
    assert_close(loaded(x), model(x))
    square = made(out=6, pattern="top_k", r=4)
    U, V = (getattr(square.base_model.model[0], f"svft_{name}")["default"] for name in "UV")
    likely = (U.T @ V.T).flatten()  # u_i · v_j
    assert likely[square.base_model.model[0].svft_places["default"]].min() == likely.topk(4)[0].min()


@pytest.mark.parametrize("options, error, text", [
    (dict(r=6), graft.ConfigError, "layer '0'.*smaller r than 6"),
    (dict(pattern="top_k"), ValueError, "has to be square"),
    (dict(off_diag=-1), graft.ConfigError, "off_diag"),
])  # fmt: skip
def test_what_cannot_be(options, error, text):
    with pytest.raises(error, match=text):
        made(**options)
