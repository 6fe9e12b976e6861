# SPDX-License-Identifier: Apache-2.0
"""BEFT: layers without a bias, embeddings, and a merge that leaves the weight alone."""

import peft
import pytest
import torch
from torch import nn

import graft
from tests import models
from tests.looks import layers
from tests.pair import LIBS, adapt, close, outcome, output, randomize
from tests.samples import Sample

NO_BIAS = Sample("BEFT", "no_bias", "mlp", dict(target_modules=["fc2"]))


@pytest.mark.differs("merging BEFT on a layer without a bias")
@pytest.mark.parametrize("lib", LIBS)
def test_a_layer_without_a_bias_runs_and_cannot_be_merged(lib):
    made = outcome(lambda: adapt(lib, NO_BIAS))
    assert made.warned("bias")
    model = randomize(made.value, NO_BIAS).eval()
    merged = outcome(model.merge_adapter)
    assert merged.kind is (ValueError if lib is peft else NotImplementedError)
    assert "Base layer has no bias" in str(merged.error)
    assert not torch.allclose(output(model, NO_BIAS), models.output(models.make("mlp"), models.inputs("mlp")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_leaves_the_weight_alone(dtype):
    model = graft.get_peft_model(nn.Sequential(nn.Linear(5, 3)).to(dtype), graft.BeftConfig(target_modules=["0"]))
    model.add_adapter("b", graft.BeftConfig(target_modules=["0"]))
    layer = layers(model)["0"]
    weight, bias = layer.base_layer.weight, layer.base_layer.bias.clone()
    version = weight._version
    with torch.no_grad():
        layer.beft_bias["default"].copy_(torch.tensor([0.3, -1.1, 2.7]))
    x = torch.randn(4, 5, dtype=dtype)
    expected = model(x)
    model.merge_adapter()
    assert layer.base_layer.weight is weight and weight._version == version
    close(model(x), expected, 1e-6 if dtype == torch.float32 else 0.05)
    assert torch.equal(layer.W0, weight)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.bias, bias)
    assert not layer.get_delta_weight("default").any() and layer.get_delta_weight("default").shape == (3, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_between_others(dtype):
    """A merge of BEFT alone keeps no copy of the weight; the next merge needs one of its own."""
    base = nn.Sequential(nn.Linear(5, 3)).to(dtype)
    model = graft.get_peft_model(base, graft.BeftConfig(target_modules=["0"]), mixed=True)
    model.add_adapter("lora", graft.LoraConfig(target_modules=["0"], r=2, lora_alpha=3))
    layer = layers(model)["0"]
    before = [p.clone() for p in (layer.base_layer.weight, layer.base_layer.bias)]
    with torch.no_grad():
        for p in layer.parameters():
            if not any(p is q for q in layer.base_layer.parameters()):
                p.normal_()
    for names in (["default", "lora"], ["lora", "default"]):
        model.set_adapter(names)
        for name in names:
            model.base_model.merge_adapter([name])
        model.base_model.unmerge_adapter()
        after = [layer.base_layer.weight, layer.base_layer.bias]
        for a, b in zip(after, before):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6 if dtype == torch.float32 else 0)


def test_many_rows_take_one_product():
    """With as many rows as kernels are made for, the shift is part of the layer's own bias: the same numbers."""
    torch.manual_seed(0)
    model = graft.get_peft_model(nn.Sequential(nn.Linear(12, 7)), graft.BeftConfig(target_modules=["0"]))
    layer = layers(model)["0"]
    with torch.no_grad():
        layer.beft_bias["default"].normal_()
    x = torch.randn(200, 12, requires_grad=True)
    g = torch.randn(200, 7)
    (model(x) * g).sum().backward()
    close(model(x), layer.base_layer(x) + layer.beft_bias["default"])
    close(layer.beft_bias["default"].grad, g.sum(0, keepdim=True))
    close(x.grad, g @ layer.base_layer.weight)


def test_an_embedding_with_a_factor():
    sample = Sample("BEFT", "embed", "gemma3", dict(target_modules=["embed_tokens"]))
    model = randomize(adapt(graft, sample), sample).eval()
    layer = layers(model)["model.embed_tokens"]
    ids = torch.tensor([[3, 5, 0]])
    scale, shift = layer.base_layer.embed_scale, layer.beft_bias["default"].flatten()
    close(layer(ids), layer.base_layer(ids) + shift * scale)
    expected = output(model, sample)
    model.merge_adapter()
    close(output(model, sample), expected)


def test_the_update_of_the_weight_is_where_the_weight_is():
    with torch.device("meta"):
        model = graft.get_peft_model(nn.Sequential(nn.Linear(3, 2)), graft.BeftConfig(target_modules=["0"]))
    assert model.base_model.model[0].get_delta_weight("default").is_meta


def test_all_tokens_shift_an_embedding_and_train_the_shift():
    """Also padding, since a merge shifts every row."""
    base = nn.Sequential(nn.Embedding(6, 3, padding_idx=0))
    model = graft.get_peft_model(base, graft.BeftConfig(target_modules=["0"]))
    c = layers(model)["0"].beft_bias["default"]
    model(torch.tensor([[0, 0, 5], [1, 0, 5]])).sum().backward()
    assert c.grad.flatten().tolist() == [6.0, 6.0, 6.0]
