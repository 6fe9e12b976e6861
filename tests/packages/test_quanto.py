# SPDX-License-Identifier: Apache-2.0
"""quanto: the matrix of methods and bit widths, a model that transformers has quantized, other settings."""

import copy

import pytest
import torch
from optimum.quanto import Calibration, QLinear, QTensor, freeze, qfloat8, qint2, qint4, qint8, quantize
from torch import nn
from torch.testing import assert_close
from transformers import LlamaForCausalLM, QuantoConfig

import graft
from graft.storage.find import find_store
from tests.looks import layers
from tests.models import disturb, seeded
from tests.packages.llama import model_tests
from tests.storage.cells import IN, Kind, cells, identity, linear


def by(weights, frozen=True):
    def hold(layer):
        made = QLinear.from_module(copy.deepcopy(layer), weights=weights)
        if frozen:
            made.freeze()
        return made.requires_grad_(False)

    return hold


KINDS = [Kind("int8", by(qint8)), Kind("int4", by(qint4))]
globals().update(cells(KINDS))


def by_transformers(weights):
    config = QuantoConfig(weights=weights)
    return lambda folder: LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)


for _test in model_tests({"int8": by_transformers("int8"), "int4": by_transformers("int4")}):
    globals()[_test.__name__] = _test


X = torch.linspace(-1, 1, 5 * IN).view(5, IN).sin()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("weights", [qint2, qint4, qint8, qfloat8], ids=str)
def test_a_new_weight_is_made_as_the_old_one_was(weights, frozen, dtype):
    old, new = by(weights, frozen)(linear().to(dtype)), linear().to(dtype)
    new.weight.data *= 1.25
    goal = by(weights, frozen)(new)
    store = find_store(old)
    assert_close(store.read(old), identity(old, dtype), rtol=1e-2, atol=2e-3)
    before = store.read(old)
    kept = store.snapshot(old)
    store.write(old, "weight", new.weight.data)
    assert type(old.weight) is type(goal.weight) and not old.weight.requires_grad
    assert torch.equal(store.read(old), store.read(goal)) and store.read(old).dtype == dtype
    assert torch.equal(store.snapshot_values(old, "weight", kept), before)
    store.restore(old, "weight", kept)
    assert torch.equal(store.read(old), before)


@pytest.mark.parametrize("activations", [qint8, qfloat8], ids=str)
def test_layers_that_round_inputs_and_outputs(activations):
    with seeded(0):
        net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)).requires_grad_(False)
        x = torch.randn(6, 64)
    quantize(net, weights=qint8, activations=activations)
    with torch.no_grad(), Calibration():
        net(x)
    freeze(net.requires_grad_(False))
    lora = dict(r=4, target_modules=["0", "2"])
    model = graft.get_peft_model(net, graft.LoraConfig(**lora), "a")
    model.add_adapter("b", graft.LoraConfig(**lora, use_dora=True))
    model = disturb(model.eval())
    names = ["a", "b", "__base__"] * 2
    y = model(x.requires_grad_())
    assert not isinstance(y, QTensor)
    mixed = model(x, adapter_names=names)
    mixed.sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert_close(mixed[0], y[0])
    model.merge_adapter()
    assert not torch.equal(model(x), y)
    model.unmerge_adapter()
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("weights", [qint8, qint4], ids=str)
def test_an_output_is_never_written_to_where_quanto_made_a_view(weights):
    store, layer = find_store(by(weights)(linear())), by(weights)(linear())
    x = X[None].clone().requires_grad_()
    y = store.protect(layer(x))
    y[:, 1:3] += 1
    y.sum().backward()
    assert_close(x.grad, store.read(layer).sum(0).expand_as(x))


def test_k_bit_preparation_leaves_packed_weights_alone():
    net = nn.Sequential(linear(), nn.LayerNorm(96)).to(torch.bfloat16)
    quantize(net, weights=qint8)
    freeze(net)
    before = find_store(net[0]).read(net[0])
    graft.prepare_model_for_kbit_training(net, use_gradient_checkpointing=False)
    assert net[1].weight.dtype == torch.float32 and torch.equal(find_store(net[0]).read(net[0]), before)
    model = disturb(graft.get_peft_model(net, graft.LoraConfig(r=2, target_modules=["0"])))
    model(X.to(torch.bfloat16)).float().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert layers(model)["0"].lora_A["default"].weight.dtype == torch.float32
