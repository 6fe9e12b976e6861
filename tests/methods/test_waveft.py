# SPDX-License-Identifier: Apache-2.0
"""WaveFT: its wavelets, and how many coefficients a layer gets."""

import warnings

import pytest
import torch
from torch import nn

import graft
from graft.methods.waveft import HIGH, LOW
from tests import models
from tests.pair import LIBS, close

AGREE = [name for name in LOW if name not in ("coif4", "coif5")]


@pytest.mark.parametrize("family", LOW)
def test_filters_are_orthogonal(family):
    """In steps of two, each filter to itself and to the other."""
    low, high = (torch.tensor(f[family], dtype=torch.float64) for f in (LOW, HIGH))
    close(low.sum(), torch.tensor(2.0, dtype=torch.float64).sqrt(), 1e-10)
    for shift in range(0, len(low), 2):
        rest = len(low) - shift
        for a, b, expected in ((low, low, shift == 0), (high, high, shift == 0), (low, high, False)):
            close((a[shift:] * b[:rest]).sum(), torch.tensor(float(expected), dtype=torch.float64), 1e-9)


@pytest.mark.parametrize("family", AGREE)
def test_an_update_is_pefts(family):
    deltas = []
    for lib in LIBS:
        models.seed(3)
        config = lib.WaveFTConfig(
            target_modules=["0"], n_frequency=60, scaling=50.0, wavelet_family=family, init_weights=False
        )
        deltas.append(lib.get_peft_model(nn.Sequential(nn.Linear(9, 14)), config).base_model.model[0])
    close(*(layer.get_delta_weight("default") for layer in deltas))


@pytest.mark.differs("WaveFT with coif4 or coif5")
@pytest.mark.parametrize("family", ["coif4", "coif5"])
def test_what_peft_computes_otherwise_is_said(family):
    """PEFT's filters of these two are not orthogonal."""
    with pytest.warns(graft.PeftWarning, match=f"other filters than those of {family}"):
        graft.WaveFTConfig(wavelet_family=family)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graft.WaveFTConfig(wavelet_family="coif3")


@pytest.mark.differs("WaveFT: wavelets without filters (db11 and above, …), FourierFT without `random_loc_seed`")
@pytest.mark.parametrize("family", ["haar", "db20", "coif17", "nope"])
def test_unknown_wavelets(family):
    """PEFT takes some that it has no filters of, and fails in the forward pass."""
    with pytest.raises(graft.ConfigError, match="Supported wavelet families are: db1, db2"):
        graft.WaveFTConfig(wavelet_family=family)


def test_layers_share_coefficients_by_size(tmp_path):
    config = graft.WaveFTConfig(
        target_modules=["fc1", "lin0"], n_frequency=30, proportional_parameters=True, init_weights=False
    )
    model = graft.get_peft_model(models.make("mlp"), config)
    sizes = {name: p.numel() for name, p in model.named_parameters() if "waveft" in name}
    assert sorted(sizes.values()) == [17, 34, 34, 34]  # of 120 and 240 weights
    assert config.n_frequency == 30
    model.save_pretrained(tmp_path)
    loaded = graft.PeftModel.from_pretrained(models.make("mlp"), tmp_path)
    x = torch.linspace(-1, 1, 40).view(1, 4, 10)
    close(loaded(x), model(x), 0)
