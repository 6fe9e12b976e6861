# SPDX-License-Identifier: Apache-2.0
"""FourierFT: where its coefficients stand, and products without the update."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import graft
from graft.methods.spectral import draw_places
from tests import models
from tests.pair import LIBS, close

CONFIG = dict(target_modules=["0"], n_frequency=30, scaling=11)


def made(base, **options):
    models.seed(1)
    return graft.get_peft_model(nn.Sequential(base), graft.FourierFTConfig(**CONFIG | options))


def test_places_are_pefts_and_no_layer_draws_them_again():
    layers = []
    for lib in LIBS:
        model = lib.get_peft_model(nn.Sequential(nn.Linear(10, 12)), lib.FourierFTConfig(**CONFIG))
        layers.append(model.base_model.model[0])
    assert torch.equal(*(layer.indices["default"] for layer in layers))
    assert draw_places(12, 10, 30, 777) is draw_places(12, 10, 30, 777)
    assert not any("indices" in key for key in layers[0].state_dict())


def test_places_that_others_get_too_train_wherever_they_were_drawn():
    """Places are kept, by size and seed."""
    sizes = dict(random_loc_seed=9)
    with FakeTensorMode():
        made(nn.Linear(6, 4), **sizes | dict(n_frequency=5))
    assert made(nn.Linear(6, 4), **sizes | dict(n_frequency=5))(torch.ones(2, 6)).sum().item()
    with torch.inference_mode():
        made(nn.Conv1d(4, 6, 3), **sizes)
    made(nn.Conv1d(4, 6, 3), **sizes)(torch.ones(2, 4, 5)).sum().backward()


def test_a_call_forms_no_update(monkeypatch):
    """One with few rows, such as a step of decoding, takes no transform of the whole weight."""
    model = made(nn.Linear(10, 12))
    x = torch.linspace(-1, 1, 30).view(3, 10).requires_grad_()
    expected = model(x)
    monkeypatch.setattr(torch.fft, "ifft2", None)
    close(model(x), expected)
    model(x).sum().backward()


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_a_file_has_the_coefficients_alone(low_cpu_mem_usage, tmp_path):
    model = made(nn.Linear(10, 12), random_loc_seed=5)
    x = torch.linspace(-1, 1, 30).view(3, 10)
    expected = model(x)
    model.save_pretrained(tmp_path)
    loaded = graft.PeftModel.from_pretrained(model.unload(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    close(loaded(x), expected, 0)
    assert loaded.base_model.model[0].indices["default"].device == x.device


def test_a_large_vocabulary_is_never_transformed():
    model = made(nn.Embedding(50, 12))
    layer, ids = model.base_model.model[0], torch.tensor([[3, 49], [0, 3]])
    close(model(ids), layer.base_layer(ids) + layer.get_delta_weight("default")[ids], 1e-5)


@pytest.mark.differs("C3A's `block_size_pattern`, FourierFT's `n_frequency_pattern`")
def test_the_pattern_reaches_modules_at_the_top():
    assert made(nn.Linear(10, 12), n_frequency_pattern={"0": 7}).base_model.model[0].indices["default"].shape == (2, 7)


def test_a_layer_has_only_the_containers_that_hold_tensors():
    layer = made(nn.Linear(10, 12)).base_model.model[0]
    assert layer.adapter_layer_names == ("fourierft_spectrum",)
    assert not hasattr(layer, "places")
