# SPDX-License-Identifier: Apache-2.0
"""DEFT: starts as the identity, takes its dropout on R alone, and unmerges what it merged."""

import pickle

import pytest
import torch
from torch import nn

import graft
from graft.kernels.narrow import multiply_widened, plain_widened_product
from tests.looks import layers
from tests.pair import adapt, close, output, randomize
from tests.samples import Sample


def config(lib, **options):
    return lib.DeftConfig(target_modules=["0"], **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", ["relu", "qr"])
def test_starts_as_the_identity(method, dtype):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(20, 12)).to(dtype)
    x = torch.randn(7, 20, dtype=dtype)
    expected = base(x)
    model = graft.get_peft_model(base, config(graft, r=4, alpha=3, decomposition_method=method))
    close(model(x).double(), expected.double(), 0.02 if dtype == torch.bfloat16 else 1e-5)


def test_the_start_of_R_is_scaled():
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(400, 400))
    model = graft.get_peft_model(wide, config(graft, r=20, init_weights=False, init_scale=4.0))
    layer = layers(model)["0"]
    assert layer.deft_R["default"].detach().std() == pytest.approx(0.08, rel=0.05)
    assert layer.deft_P["default"].detach().std() == pytest.approx(0.02, rel=0.05)


def test_dropout_acts_on_the_input_of_R():
    torch.manual_seed(0)
    model = graft.get_peft_model(nn.Sequential(nn.Linear(20, 12)), config(graft, r=4, deft_dropout=0.5)).train()
    layer = layers(model)["0"]
    with torch.no_grad():
        layer.deft_P["default"].normal_()
        layer.deft_R["default"].zero_()
    x = torch.randn(7, 20)
    assert torch.equal(model(x), model(x)), "what is taken out is not random"
    layer.deft_R["default"].data.normal_()
    assert not torch.allclose(model(x), model(x))
    kept = nn.functional.dropout
    torch.manual_seed(3)
    y = model(x)
    torch.manual_seed(3)
    P, R = layer.deft_P["default"], layer.deft_R["default"]
    W = layer.base_layer.weight
    expected = layer.base_layer(x) - x @ W.T @ P.relu() @ P.T + kept(x, 0.5) @ R.T @ P.T
    close(y, expected)


@pytest.mark.parametrize("options", [dict(), dict(deft_dropout=0.1)])
def test_unmerging_after_more_training(options):
    torch.manual_seed(0)
    model = graft.get_peft_model(nn.Sequential(nn.Linear(20, 12)), config(graft, r=4, **options))
    layer = layers(model)["0"]
    before = layer.base_layer.weight.clone()
    layer.deft_R["default"].data.normal_()
    model.merge_adapter()
    layer.deft_P["default"].data.normal_()
    model.unmerge_adapter()
    close(layer.base_layer.weight, before, 1e-6)


@pytest.mark.differs("DEFT beside a merged adapter")
def test_an_adapter_made_while_another_is_merged():
    torch.manual_seed(0)
    model = graft.get_peft_model(nn.Sequential(nn.Linear(20, 12)), config(graft, r=4))
    layer, x = layers(model)["0"], torch.randn(7, 20)
    expected = layer.base_layer(x)
    layer.deft_R["default"].data.normal_()
    model.merge_adapter()
    model.add_adapter("b", config(graft, r=4))
    model.unmerge_adapter()
    model.set_adapter("b")
    close(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_with_a_frozen_weight(dtype):
    torch.manual_seed(0)
    Z, W = torch.randn(12, 3, requires_grad=True), torch.randn(12, 20).to(dtype)
    g = torch.randn(3, 20)
    for f in (multiply_widened, plain_widened_product):
        y = f(Z.T, W)
        close(y, Z.T @ W.float())
        (grad,) = torch.autograd.grad((y * g).sum(), Z)
        close(grad, W.float() @ g.T)


def test_an_embedding_with_a_factor():
    sample = Sample("DEFT", "embed", "gemma3", dict(target_modules=["embed_tokens", "q_proj"], r=3))
    model = randomize(adapt(graft, sample), sample).eval()
    expected = output(model, sample)
    model.merge_adapter()
    close(output(model, sample), expected)


@pytest.mark.parametrize("options", [dict(), dict(deft_dropout=0.1)])
def test_a_copy_that_is_merged_unmerges(options):
    """What unmerging needs goes with the copy."""
    torch.manual_seed(0)
    model = graft.get_peft_model(nn.Sequential(nn.Linear(20, 12)), config(graft, r=4, **options))
    before = layers(model)["0"].base_layer.weight.clone()
    layers(model)["0"].deft_R["default"].data.normal_()
    model.merge_adapter()
    twin = pickle.loads(pickle.dumps(model))
    twin.unmerge_adapter()
    close(layers(twin)["0"].base_layer.weight, before, 1e-6)
